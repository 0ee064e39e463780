"""The NDIF-compatible endpoint: what unmodified nnsight 0.8 speaks, as a FastAPI application over one `Mesh`.

This process never imports nnsight (its import mounts a method on every object, which breaks uploads), and never forwards
bytes of a site.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import distributions, packages_distributions
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import HTTPException
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.datastructures import UploadFile

from edif_mesh import __version__
from edif_mesh.client.mesh import Mesh
from edif_mesh.config import ClientConfig
from edif_mesh.domain.ids import JobId, is_job_id
from edif_mesh.domain.site import ModelState, SiteStatus
from edif_mesh.errors import EdifError, NoReplyError, NotFoundError, RefusedError, StoreFullError, TransportError
from edif_mesh.gateway.driver import Driver
from edif_mesh.gateway.guard import LocalOnly
from edif_mesh.gateway.model_keys import make_model_key
from edif_mesh.gateway.requests import MAX_PAYLOAD_BYTES, UPGRADE, check_length, client_versions, job_spec, too_large
from edif_mesh.gateway.results import ResultStore, warm_up
from edif_mesh.gateway.sessions import Sessions
from edif_mesh.wire.messages import MeshView

_LEVELS = {ModelState.LOADED: ("HOT", "RUNNING"), ModelState.LOADING: ("HOT", "DEPLOYING"),
           ModelState.LOADABLE: ("WARM", "NOT_STARTED"), ModelState.FAILED: ("COLD", "UNHEALTHY")}  # fmt: skip


def create_app(config: ClientConfig, name: str = "gateway") -> Any:
    """Return the ASGI application; it connects to the mesh when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(warm_up)
        async with await Mesh.connect(config, name=name) as mesh:
            await mesh.flush_outbox()
            mesh.outbox.prune()
            results = ResultStore(
                config.outbox_dir.parent / "gateway-results", mesh.key.sign(b"edif gateway: addresses of results")
            )
            sessions = Sessions()
            app.state.mesh, app.state.results, app.state.sessions = mesh, results, sessions
            app.state.driver = Driver(mesh, sessions, results)
            yield

    app = FastAPI(title="eDIF Mesh gateway", version=__version__, lifespan=lifespan, redirect_slashes=False)
    _routes(app)
    app.add_exception_handler(EdifError, _on_error)
    hosts = frozenset({config.gateway_host, "127.0.0.1", "localhost", "[::1]"})
    return LocalOnly(app, hosts)


def _routes(app: FastAPI) -> None:
    app.add_api_websocket_route("/subscribe", _subscribe)
    app.add_api_route("/request", _request, methods=["POST"])
    app.add_api_route("/response/{job}", _response, methods=["GET"])
    app.add_api_route("/result/{job}/{token}", _result, methods=["GET", "HEAD"])
    app.add_api_route("/status", _status, methods=["GET"])
    app.add_api_route("/env", _env, methods=["GET"])
    app.add_api_route("/whoami", _whoami, methods=["GET"])
    app.add_api_route("/ping", _ping, methods=["GET"])
    app.add_api_route("/connected", _connected, methods=["GET", "HEAD"])
    for path in ("/ws/socket.io/", "/ws/socket.io"):
        app.add_api_route(path, _old_client, methods=["GET", "POST"])
        app.add_api_websocket_route(path, _old_socket)


async def _subscribe(socket: WebSocket) -> None:
    await socket.app.state.sessions.serve(socket)


async def _request(request: Request) -> JSONResponse:
    """Take one job: form field `data` (JSON) and file `blob`."""
    if "nnsight-model-key" in request.headers or "multipart" not in request.headers.get("content-type", ""):
        raise HTTPException(400, UPGRADE)
    check_length(request)
    client = client_versions(request)
    async with request.form(max_part_size=1 << 20) as form:
        data, blob = form.get("data"), form.get("blob")
        if not isinstance(data, str) or not isinstance(blob, UploadFile):
            raise HTTPException(
                400, "The request lacks its form field `data` or its file `blob`. Is nnsight up to date?"
            )
        payload = await blob.read()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise HTTPException(413, too_large(len(payload)))
    spec, session = job_spec(data, payload, client)
    driver: Driver = request.app.state.driver
    if session and session not in request.app.state.sessions:
        raise HTTPException(409, "The session is not open any more. Run the trace again.")
    return JSONResponse(await driver.submit(payload, spec, session, _base_url(request)))


async def _response(request: Request, job: str) -> JSONResponse:
    """The newest state of a job, for clients that poll; 404 while there is none."""
    if not is_job_id(job):
        raise HTTPException(400, f"{job[:60]!r} is no job id.")
    found = await request.app.state.driver.response(JobId(job), _base_url(request))
    if found is None:
        raise HTTPException(404, "There is no news of this job yet.")
    return JSONResponse(found)


async def _result(request: Request, job: str, token: str) -> FileResponse:
    """A result's blob; Range and HEAD are understood, and it can be fetched again for as long as the mesh keeps it."""
    state = request.app.state
    path = await state.driver.file(JobId(job)) if is_job_id(job) and state.results.opens(job, token) else None
    if path is None:
        raise HTTPException(404, f"There is no result of {job[:60]} at this address.")
    return _Download(path, media_type="application/octet-stream")


class _Download(FileResponse):
    """A file in large pieces: each costs a thread and a write."""

    chunk_size = 1 << 20


async def _status(request: Request) -> dict[str, Any]:
    """Models and their state, as `nnsight.ndif_status()` reads them."""
    view: MeshView = await request.app.state.mesh.view()
    deployments = {}
    for site in view.sites:
        if site.status in (SiteStatus.LOST, SiteStatus.SUSPECT):
            continue
        for offer in site.models:
            level, state = _LEVELS[offer.state]
            deployments[f"{offer.repo_id}@{site.site}"] = {
                "deployment_level": level,
                "application_state": state,
                "model_key": make_model_key(offer.repo_id, None, offer.task),
                "repo_id": offer.repo_id,
                "task": offer.task,
                "revision": None,
                "commit": offer.revision,
                "trust_remote_code": False,
                "dtype": offer.dtype,
                "attn_implementation": offer.attn_implementation,
                "site": site.site,
                "country": site.country,
                "slots": site.slots,
                "free_slots": site.free_slots,
            }
    return {"deployments": deployments, "cluster": {"nodes": {}}, "queued": view.queued, "running": view.running}


async def _env(request: Request) -> dict[str, Any]:
    """Python and packages of the side that runs the code, as far as sites state them; else of this machine."""
    packages = dict(await asyncio.to_thread(_installed))
    python = sys.version
    try:
        sites = (await request.app.state.mesh.view()).sites
    except EdifError:
        sites = ()
    for site in sites[:1]:
        stated = site.versions
        known = {"nnsight": stated.nnsight, "torch": stated.torch, "transformers": stated.transformers}
        for name, text in known.items():
            # Sites state torch without its build ("+cu126"): no difference that a client should be warned of.
            if text and packages.get(name, "").partition("+")[0] != text:
                packages[name] = text
        python = stated.python or python
    return {"python_version": python, "packages": packages}


@functools.cache
def _installed() -> dict[str, str]:
    """Versions by import name; reading them takes a second."""
    installed = {d.metadata["Name"]: d.version for d in distributions()}
    owners = {module: names[0] for module, names in packages_distributions().items() if names}
    return {m: installed[name] for m, name in owners.items() if not m.startswith("_") and name in installed}


async def _whoami(request: Request) -> dict[str, Any]:
    mesh: Mesh = request.app.state.mesh
    own = [i for i in mesh.trust.identities() if i.key == mesh.key.id]
    return {"email": own[0].name if own else mesh.key.id, "tags": [], "key": mesh.key.id}


async def _ping() -> PlainTextResponse:
    return PlainTextResponse('"pong"', media_type="application/json")


async def _connected(request: Request) -> JSONResponse:
    """200 when a coordinator answers, else 503 with the reason."""
    try:
        await request.app.state.mesh.view()
    except EdifError as error:
        return JSONResponse({"status": "disconnected", "detail": str(error)}, 503)
    return JSONResponse({"status": "connected"})


async def _old_client() -> JSONResponse:
    raise HTTPException(400, UPGRADE)


async def _old_socket(socket: WebSocket) -> None:
    await socket.send_denial_response(JSONResponse({"detail": UPGRADE}, 400))


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    codes: list[tuple[type[EdifError], int]] = [
        (NotFoundError, 404),
        (RefusedError, 400),
        (StoreFullError, 507),
        (NoReplyError, 503),
        (TransportError, 503),
    ]
    code = next((number for kind, number in codes if isinstance(error, kind)), 400)
    return JSONResponse({"detail": str(error), "code": getattr(error, "code", "error")}, code)


def _base_url(request: Request) -> str:
    return str(request.base_url).rstrip("/")
