"""The coordinator's HTTP face, read only: web page, JSON API, live stream, metrics, health."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import TypeAdapter
from starlette.types import Receive, Scope, Send

from coordinator.monitoring.metrics import Metrics
from coordinator.monitoring.reader import Event, Health, MeshReader
from coordinator.monitoring.security import SecureHeaders
from coordinator.monitoring.stream import Hub, StreamResponse
from edif_mesh.domain.ids import JobId, is_job_id
from edif_mesh.domain.job import JobStatus
from edif_mesh.wire.messages import JobSnapshot, MeshView, SiteVerdict, SiteView

MAX_LOOP_SILENCE_MS = 10_000
"""A loop that has not moved for this long is not alive."""
PAGE_ROWS = 50

Limit = Annotated[int, Query(ge=1, le=500)]
Offset = Annotated[int, Query(ge=0, le=1_000_000)]
_PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_MESH: TypeAdapter[Any] = TypeAdapter(MeshView)
_JOBS: TypeAdapter[Any] = TypeAdapter(list[JobSnapshot])
_EVENTS: TypeAdapter[Any] = TypeAdapter(list[Event])


class Monitoring:
    """The ASGI application and its live stream."""

    def __init__(self, reader: MeshReader, metrics: Metrics, host: str) -> None:
        self.hub = Hub(lambda: reader.changes, lambda: _frame(reader))
        api = FastAPI(title="eDIF Mesh coordinator", docs_url=None, redoc_url=None, openapi_url="/api/v1/openapi.json")
        _add_health(api, reader, metrics)
        _add_api(api, reader, self.hub)
        _add_page(api)
        self.app = SecureHeaders(api, host)


def _add_health(api: FastAPI, reader: MeshReader, metrics: Metrics) -> None:
    @api.get("/metrics", include_in_schema=False)
    async def get_metrics() -> Response:
        return Response(metrics.render(reader.gauges()), media_type=CONTENT_TYPE_LATEST)

    @api.get("/healthz")
    async def healthz() -> Response:
        silent = reader.health().loop_moved_ms_ago
        alive = silent <= MAX_LOOP_SILENCE_MS
        return JSONResponse({"alive": alive, "loop_moved_ms_ago": silent}, 200 if alive else 503)

    @api.get("/readyz")
    async def readyz() -> Response:
        reasons = reader.health().reasons
        return JSONResponse({"ready": not reasons, "reasons": list(reasons)}, 503 if reasons else 200)


def _add_api(api: FastAPI, reader: MeshReader, hub: Hub) -> None:
    @api.get("/api/v1/mesh")
    async def mesh() -> MeshView:
        return reader.mesh()

    @api.get("/api/v1/sites")
    async def sites() -> list[SiteView]:
        return list(reader.mesh().sites)

    @api.get("/api/v1/jobs")
    async def jobs(status: JobStatus | None = None, limit: Limit = 50, offset: Offset = 0) -> list[JobSnapshot]:
        return list(await reader.jobs(status=status, limit=limit, offset=offset))

    @api.get("/api/v1/jobs/{job}")
    async def job(job: str) -> JobSnapshot:
        return await _find(reader, job, explain=False)

    @api.get("/api/v1/jobs/{job}/why")
    async def why(job: str) -> list[SiteVerdict]:
        return list((await _find(reader, job, explain=True)).why)

    @api.get("/api/v1/events")
    async def events(
        before: Annotated[int | None, Query(ge=0, lt=1 << 63)] = None, job: str | None = None, limit: Limit = 100
    ) -> list[Event]:
        if job is not None and not is_job_id(job):
            raise HTTPException(404, "This is no job id.")
        return list(await reader.events(before=before, job=None if job is None else JobId(job), limit=limit))

    @api.get("/api/v1/stream", include_in_schema=False)
    async def stream() -> Response:
        if hub.full:
            return PlainTextResponse("Too many readers of the live page; try again later.\n", 503)
        return _Streamed(hub)


class _Streamed(Response):
    def __init__(self, hub: Hub) -> None:
        super().__init__(media_type="text/event-stream")
        self._stream = StreamResponse(hub)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._stream(scope, receive, send)


def _add_page(api: FastAPI) -> None:
    folder = files("coordinator.monitoring") / "page"
    for path, (name, media_type) in _PAGE_FILES.items():
        api.add_route(path, _fixed((folder / name).read_bytes(), media_type))


def _fixed(content: bytes, media_type: str) -> Callable[[Request], Response]:
    def page(_request: Request) -> Response:
        return Response(content, media_type=media_type)

    return page


async def _find(reader: MeshReader, job: str, *, explain: bool) -> JobSnapshot:
    found = await reader.job(JobId(job), explain=explain) if is_job_id(job) else None
    if found is None:
        raise HTTPException(404, "No job of this id is recorded here.")
    return found


async def _frame(reader: MeshReader) -> dict[str, object]:
    """Everything that the page shows, as JSON values."""
    recent = await reader.jobs(status=None, limit=PAGE_ROWS, offset=0)
    events = await reader.events(before=None, job=None, limit=PAGE_ROWS)
    health: Health = reader.health()
    return {
        "mesh": _MESH.dump_python(reader.mesh(), mode="json"),
        "queue": dict(sorted(reader.queue().items(), key=lambda item: -item[1])[:PAGE_ROWS]),
        "jobs": _JOBS.dump_python([replace(job, manifest=None, why=()) for job in recent], mode="json"),
        "events": _EVENTS.dump_python(list(events), mode="json"),
        "reasons": list(health.reasons),
    }
