"""The driving of one job for each request: submitted, followed for its session, its result prepared."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from edif_mesh.client.job import Job
from edif_mesh.client.mesh import JobSpec, Mesh
from edif_mesh.domain.ids import JobId
from edif_mesh.domain.job import JobStatus
from edif_mesh.errors import EdifError, NotFoundError, StoreFullError, TransportError
from edif_mesh.gateway.frames import binary_frame, frame, meta_of, snapshot_frame, status_of, text_frame
from edif_mesh.gateway.results import ResultStore, decode
from edif_mesh.gateway.sessions import Sessions
from edif_mesh.wire.messages import JobSnapshot

log = logging.getLogger(__name__)

_THREAD_FROM_BYTES = 256 << 10
_MEMORY_BYTES = 32 << 20
"""A larger result lies in a file on its way through the gateway."""


class Driver:
    """Follows jobs for the clients of the gateway and prepares their results."""

    def __init__(self, mesh: Mesh, sessions: Sessions, results: ResultStore) -> None:
        self._mesh, self._sessions, self._results = mesh, sessions, results
        self._making: dict[tuple[JobId, bool], asyncio.Task[bytes | None]] = {}

    async def submit(self, payload: bytes, spec: JobSpec, session: str, base_url: str) -> dict[str, Any]:
        """Submit and follow in the background; returns the RECEIVED frame once the order is durable somewhere.

        While the broker is away the order waits in the outbox of this machine, and leaves as soon as it answers. Raises
        StoreFullError, after which nothing was submitted.
        """
        job: Job | None = None

        def printed(line: str) -> None:
            if job is not None:
                self._sessions.send(session, text_frame(frame(job.id, "LOG", line)))

        job = await self._mesh.prepare(payload, spec, follow=bool(session), on_line=printed if session else None)
        text = "Your order is signed and on its way."
        try:
            await self._mesh.send(job)
        except StoreFullError:
            self._mesh.outbox.withdrawn(job.id)
            await job.close()
            raise
        except TransportError as error:
            log.warning("order waits in the outbox", extra={"job": job.id, "error": str(error)})
            text = (
                "The broker does not answer at present: your order waits on this machine and leaves as soon as it does."
            )
        self._mesh.spawn(self._follow(job, session, spec.compressed, base_url))
        return frame(job.id, "RECEIVED", text)

    async def response(self, job_id: JobId, base_url: str) -> dict[str, Any] | None:
        """Return the frame that a polling client gets now; None while there is no news."""
        waits = self._mesh.outbox.waits(job_id)  # before we ask: it may be recorded or refused in the meantime
        job = self._mesh.job(job_id)
        try:
            snapshot = await job.status(patience_s=0)
            if snapshot.status is not JobStatus.SUCCEEDED:
                return snapshot_frame(snapshot)
            await self._kept(job, snapshot)
        except TransportError:
            return None
        except NotFoundError as error:
            return None if waits else frame(job_id, "ERROR", str(error))
        except EdifError as error:
            return frame(job_id, "ERROR", str(error))
        return frame(job_id, "COMPLETED", snapshot.text, self._url(job_id, base_url), meta_of(snapshot))

    async def file(self, job_id: JobId) -> Path | None:
        """Return the blob of a job that has succeeded, made again when it is gone from here; raises EdifError."""
        if self._results.find(job_id) is None:
            job = self._mesh.job(job_id)
            snapshot = await job.status(patience_s=0)
            if snapshot.status is not JobStatus.SUCCEEDED:
                return None
            return await self._kept(job, snapshot)
        return self._results.find(job_id)

    def _url(self, job_id: JobId, base_url: str) -> str:
        return f"{base_url}/result/{job_id}/{self._results.token(job_id)}"

    async def _follow(self, job: Job, session: str, compress: bool, base_url: str) -> None:
        """Send the session every new state, and the end. Without a session: until the coordinator has the job."""
        shown = ""
        try:
            async for snapshot in job.watch():
                if not session:
                    return
                if snapshot.status.terminal and job.printing is not None:
                    await job.printing.finish()
                if snapshot.status is JobStatus.SUCCEEDED:
                    await self._complete(job, snapshot, session, compress, base_url)
                    return
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
            await job.close()

    async def _complete(self, job: Job, snapshot: JobSnapshot, session: str, compress: bool, base_url: str) -> None:
        blob = await self._blob(job, snapshot, compress, keep=session not in self._sessions)
        done = frame(job.id, status_of(snapshot), snapshot.text, meta=meta_of(snapshot))
        if blob is not None:
            self._sessions.send(session, binary_frame({**done, "data": blob}))
            return
        self._sessions.send(session, text_frame({**done, "data": self._url(job.id, base_url)}))

    async def _kept(self, job: Job, snapshot: JobSnapshot) -> Path | None:
        """Return the blob on disk of a job that has succeeded, made where there is none."""
        if self._results.find(job.id) is None:
            await self._blob(job, snapshot, _compressed(job), keep=True)
        return self._results.find(job.id)

    async def _blob(self, job: Job, snapshot: JobSnapshot, compress: bool, *, keep: bool) -> bytes | None:
        """Fetch, verify, decode and write anew; once, however many ask. None: it is kept on disk."""
        key = (job.id, keep)
        if key not in self._making:
            self._making[key] = self._mesh.spawn(self._make(job, snapshot, compress, keep))
            self._making[key].add_done_callback(lambda _: self._making.pop(key))
        return await asyncio.shield(self._making[key])

    async def _make(self, job: Job, snapshot: JobSnapshot, compress: bool, keep: bool) -> bytes | None:
        job.memory_bytes = _MEMORY_BYTES
        archive = await job.fetch(job.verified_manifest(snapshot))
        if self._results.is_small(archive) and not keep:
            if len(archive) <= _THREAD_FROM_BYTES:
                return decode(archive, compress)
            return await asyncio.to_thread(decode, archive, compress)
        await asyncio.to_thread(self._results.keep, job.id, archive, compress)
        return None


def _compressed(job: Job) -> bool:
    """Whether the job's client asked for one zstd frame, as nnsight does by itself."""
    order = job.order()
    return order is None or order.payload.compressed
