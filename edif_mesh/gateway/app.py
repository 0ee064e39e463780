"""The NDIF-compatible endpoint: what unmodified nnsight 0.8 speaks, as a FastAPI application over one `Mesh`.

This process never imports nnsight (its import mounts a method on every object, which breaks uploads), and never forwards
bytes of a site.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import distributions, packages_distributions
from typing import Any

import zstandard
from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import HTTPException
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.datastructures import UploadFile

from edif_mesh import __version__
from edif_mesh.client.mesh import JobSpec, Mesh
from edif_mesh.config import ClientConfig
from edif_mesh.domain.job import JobClass
from edif_mesh.domain.site import ModelState, SiteStatus, Versions
from edif_mesh.errors import EdifError, NoReplyError, NotFoundError, RefusedError, StoreFullError, TransportError
from edif_mesh.gateway.frames import frame
from edif_mesh.gateway.guard import LocalOnly
from edif_mesh.gateway.model_keys import make_model_key, parse_model_key
from edif_mesh.gateway.results import ResultStore
from edif_mesh.gateway.sessions import Driver, Sessions
from edif_mesh.wire.messages import MeshView

MAX_PAYLOAD_BYTES = 1 << 30
MIN_NNSIGHT = (0, 8)
_UPGRADE = "This mesh speaks the protocol of nnsight 0.8. Your client is older: pip install -U 'nnsight>=0.8'"
_LEVELS = {ModelState.LOADED: ("HOT", "RUNNING"), ModelState.LOADING: ("HOT", "DEPLOYING"),
           ModelState.LOADABLE: ("WARM", "NOT_STARTED"), ModelState.FAILED: ("COLD", "UNHEALTHY")}  # fmt: skip


def create_app(config: ClientConfig, name: str = "gateway") -> Any:
    """Return the ASGI application; it connects to the mesh when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with await Mesh.connect(config, name=name) as mesh:
            await mesh.flush_outbox()
            mesh.outbox.prune()
            results = ResultStore(config.outbox_dir.parent / "gateway-results")
            sessions = Sessions()
            app.state.mesh, app.state.results, app.state.sessions = mesh, results, sessions
            app.state.driver = Driver(mesh, sessions, results)
            yield

    app = FastAPI(title="eDIF Mesh gateway", version=__version__, lifespan=lifespan)
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
    app.add_api_route("/ws/socket.io/", _old_client, methods=["GET", "POST"])


async def _subscribe(socket: WebSocket) -> None:
    await socket.app.state.sessions.serve(socket)


async def _request(request: Request) -> JSONResponse:
    """Take one job: form field `data` (JSON) and file `blob`."""
    if "nnsight-model-key" in request.headers or "multipart" not in request.headers.get("content-type", ""):
        raise HTTPException(400, _UPGRADE)
    _check_length(request)
    client = _client_versions(request)
    async with request.form(max_part_size=1 << 20) as form:
        data, blob = form.get("data"), form.get("blob")
        if not isinstance(data, str) or not isinstance(blob, UploadFile):
            raise HTTPException(
                400, "The request lacks its form field `data` or its file `blob`. Is nnsight up to date?"
            )
        payload = await blob.read()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise HTTPException(413, _too_large(len(payload)))
    spec, session = _spec(data, payload, client)
    driver: Driver = request.app.state.driver
    if session and session not in request.app.state.sessions:
        raise HTTPException(409, "The session is not open any more. Run the trace again.")
    job = await driver.submit(payload, spec, session, _base_url(request))
    return JSONResponse(frame(job.id, "RECEIVED", "Your order is signed and on its way."))


async def _response(request: Request, job: str) -> JSONResponse:
    """The newest state of a job, for clients that poll; 404 while there is none."""
    try:
        return JSONResponse(await request.app.state.driver.response(job, _base_url(request)))
    except (NotFoundError, TransportError) as error:
        raise HTTPException(404, str(error)) from error


async def _result(request: Request, job: str, token: str) -> FileResponse:
    """A result's blob; Range and HEAD are understood, and it can be fetched again."""
    path = request.app.state.results.find(job, token)
    if path is None:
        raise HTTPException(
            404, f"There is no result of {job} here (any more). Type: edif fetch {job} -o FILE.safetensors"
        )
    return FileResponse(path, media_type="application/octet-stream")


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
    packages = {}
    names = packages_distributions()
    installed = {d.metadata["Name"]: d.version for d in distributions()}
    for module, owners in names.items():
        if not module.startswith("_") and owners and owners[0] in installed:
            packages[module] = installed[owners[0]]
    try:
        sites = (await request.app.state.mesh.view()).sites
    except EdifError:
        sites = ()
    for site in sites[:1]:
        stated = {
            "nnsight": site.versions.nnsight,
            "torch": site.versions.torch,
            "transformers": site.versions.transformers,
        }
        packages |= {name: text for name, text in stated.items() if text}
    return {"python_version": sys.version, "packages": packages}


async def _whoami(request: Request) -> dict[str, Any]:
    mesh: Mesh = request.app.state.mesh
    own = [i for i in mesh.trust.identities() if i.key == mesh.key.id]
    return {"email": own[0].name if own else mesh.key.id, "tags": []}


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
    raise HTTPException(400, _UPGRADE)


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


def _spec(data: str, payload: bytes, client: Versions) -> tuple[JobSpec, str]:
    try:
        value = json.loads(data)
        key, session, compress, env = (
            value["model_key"],
            value.get("session_id") or "",
            value.get("compress"),
            value.get("env"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HTTPException(
            400, "The request's `data` is not what nnsight 0.8 sends. Is nnsight up to date?"
        ) from error
    env = env or {}
    if not isinstance(key, str) or not isinstance(session, str) or not isinstance(env, dict):
        raise HTTPException(400, "The request's `data` has a field of the wrong type.")
    if not all(isinstance(k, str) and (v is None or isinstance(v, str)) and len(k) < 100 for k, v in env.items()):
        raise HTTPException(400, "The request's `env` may hold only short texts.")
    spec = JobSpec(
        model=parse_model_key(key),
        compressed=bool(compress),
        uncompressed_bytes=_declared_bytes(payload) if compress else len(payload),
        env=env,
        client=client,
        job_class=JobClass.INTERACTIVE if session else JobClass.BATCH,
    )
    return spec, session


def _declared_bytes(payload: bytes) -> int:
    """Return the size that a zstd frame declares: it goes into the order, and the runner stops decompressing there."""
    try:
        size: int = zstandard.frame_content_size(payload)
    except zstandard.ZstdError as error:
        raise HTTPException(400, "The request says that it is compressed, but it is not a zstd frame.") from error
    if size > MAX_PAYLOAD_BYTES:
        raise HTTPException(413, _too_large(size))
    return size if size > 0 else MAX_PAYLOAD_BYTES


def _client_versions(request: Request) -> Versions:
    nnsight = request.headers.get("nnsight-version", "")
    parts = nnsight.split(".")[:2]
    if len(parts) < 2 or not all(p.isdigit() for p in parts) or tuple(map(int, parts)) < MIN_NNSIGHT:
        raise HTTPException(400, f"{_UPGRADE} (it says that it is {nnsight[:40] or 'unknown'})")
    python = (request.headers.get("python-version", "").split() or [""])[0][:20]
    return Versions(python=python, nnsight=nnsight[:40])


def _check_length(request: Request) -> None:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_PAYLOAD_BYTES + (1 << 20):
        raise HTTPException(413, _too_large(int(length)))


def _too_large(size: int) -> str:
    return (
        f"The job's payload has {size / 1e6:,.0f} MB; {MAX_PAYLOAD_BYTES / 1e6:,.0f} MB are allowed. Do not capture large tensors in the "
        "traced block: build them inside it, or send a smaller part."
    )


def _base_url(request: Request) -> str:
    return str(request.base_url).rstrip("/")
