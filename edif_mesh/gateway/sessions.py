"""WebSocket sessions of blocking clients, and the driving of one job for each request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from edif_mesh.client.job import Job
from edif_mesh.client.mesh import JobSpec, Mesh
from edif_mesh.domain.job import JobStatus
from edif_mesh.errors import EdifError
from edif_mesh.gateway.frames import binary_frame, frame, meta_of, snapshot_frame, status_of, text_frame
from edif_mesh.gateway.results import INLINE_BYTES, ResultStore, make_blob
from edif_mesh.wire.messages import JobSnapshot

log = logging.getLogger(__name__)


class Sessions:
    """Open sessions by id; frames for a session whose client has gone are dropped, the job goes on."""

    def __init__(self) -> None:
        self._queues: dict[str, asyncio.Queue[str | bytes]] = {}

    async def serve(self, socket: WebSocket) -> None:
        """Serve one client until it leaves."""
        await socket.accept()
        session = secrets.token_urlsafe(16)
        queue = self._queues[session] = asyncio.Queue()
        await socket.send_text(text_frame({"session_id": session}))
        sending = asyncio.create_task(_pump(queue, socket))
        try:
            while True:
                await socket.receive()
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            del self._queues[session]
            sending.cancel()

    def __contains__(self, session: str) -> bool:
        return session in self._queues

    def send(self, session: str, data: str | bytes) -> None:
        """Queue one frame for a session."""
        queue = self._queues.get(session)
        if queue is not None:
            queue.put_nowait(data)


async def _pump(queue: asyncio.Queue[str | bytes], socket: WebSocket) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            data = await queue.get()
            if isinstance(data, bytes):
                await socket.send_bytes(data)
            else:
                await socket.send_text(data)


class Driver:
    """Follows jobs for the clients of the gateway and prepares their results."""

    def __init__(self, mesh: Mesh, sessions: Sessions, results: ResultStore) -> None:
        self._mesh, self._sessions, self._results = mesh, sessions, results
        self._compress: dict[str, bool] = {}
        self._making: dict[str, asyncio.Task[bytes]] = {}

    async def submit(self, payload: bytes, spec: JobSpec, session: str, base_url: str) -> Job:
        """Submit and, for a blocking client, follow in the background; returns once the broker has the order."""
        job = await self._mesh.submit(payload, spec, follow=bool(session))
        self._remember(job.id, spec.compressed)
        self._mesh.spawn(self._follow(job, session, spec.compressed, base_url))
        return job

    async def response(self, job_id: str, base_url: str) -> dict[str, Any]:
        """Return the frame that a polling client gets now; raises NotFoundError."""
        job = self._mesh.job(job_id)
        snapshot = await job.status()
        if snapshot.status is not JobStatus.SUCCEEDED:
            return snapshot_frame(snapshot)
        compressed = self._compress.get(job_id, True)
        token = self._results.token(job_id)
        if token is None:
            await self._blob(job, snapshot, compressed)
            token = self._results.token(job_id)
        return frame(job_id, "COMPLETED", snapshot.text, f"{base_url}/result/{job_id}/{token}", meta_of(snapshot))

    async def _follow(self, job: Job, session: str, compress: bool, base_url: str) -> None:
        printing = await job.listen(lambda text: self._log(session, job.id, text)) if session else None
        shown = ""
        try:
            async for snapshot in job.watch():
                if snapshot.status is JobStatus.SUCCEEDED:
                    await self._complete(job, snapshot, session, compress, base_url)
                    continue
                text = text_frame(snapshot_frame(snapshot))
                if text != shown:
                    self._sessions.send(session, text)
                    shown = text
        except EdifError as error:
            self._sessions.send(session, text_frame(frame(job.id, "ERROR", str(error))))
        except Exception:
            log.exception("job could not be followed", extra={"job": job.id})
            text = "The gateway met an unexpected error; its log says more. The job itself goes on: edif show " + job.id
            self._sessions.send(session, text_frame(frame(job.id, "ERROR", text)))
        finally:
            if printing is not None:
                await printing.close()

    async def _complete(self, job: Job, snapshot: JobSnapshot, session: str, compress: bool, base_url: str) -> None:
        if not session:
            return
        blob = await self._blob(job, snapshot, compress, keep=session not in self._sessions)
        done = frame(job.id, status_of(snapshot), snapshot.text, meta=meta_of(snapshot))
        if len(blob) <= INLINE_BYTES:
            self._sessions.send(session, binary_frame({**done, "data": blob}))
            return
        token = await self._results.keep(job.id, blob)
        self._sessions.send(session, text_frame({**done, "data": f"{base_url}/result/{job.id}/{token}"}))

    async def _blob(self, job: Job, snapshot: JobSnapshot, compress: bool, *, keep: bool = True) -> bytes:
        """Fetch, verify, decode and write anew; once for each job, however many ask."""
        if job.id not in self._making:
            self._making[job.id] = self._mesh.spawn(self._make(job, snapshot, compress, keep))
        task = self._making[job.id]
        try:
            return await asyncio.shield(task)
        finally:
            self._making.pop(job.id, None)

    async def _make(self, job: Job, snapshot: JobSnapshot, compress: bool, keep: bool) -> bytes:
        archive = await job.fetch(job.verified_manifest(snapshot))
        if len(archive) <= 256 << 10:
            blob = make_blob(archive, compress)
        else:
            blob = await asyncio.to_thread(make_blob, archive, compress)
        if keep:
            await self._results.keep(job.id, blob)
        return blob

    def _log(self, session: str, job: str, text: str) -> None:
        self._sessions.send(session, text_frame(frame(job, "LOG", text.removesuffix("\n"))))

    def _remember(self, job: str, compress: bool) -> None:
        self._compress[job] = compress
        while len(self._compress) > 100_000:
            self._compress.pop(next(iter(self._compress)))
