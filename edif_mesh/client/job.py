"""A job handle: follow it, read what it prints, take its result, cancel it; from this process or any later one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edif_mesh.domain.ids import Digest, JobId, SiteId
from edif_mesh.domain.job import Failure, JobStatus
from edif_mesh.errors import (
    EdifError,
    JobCancelledError,
    JobError,
    JobExpiredError,
    JobFailedError,
    ManifestError,
    NoReplyError,
    NotConnectedError,
    NotFoundError,
    RefusedError,
    TransportError,
    UserCodeError,
)
from edif_mesh.results.manifest import check_manifest, check_sizes
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import BufferSink
from edif_mesh.transport.ports import Incoming, Subscription
from edif_mesh.wire import subjects
from edif_mesh.wire.codec import decode_as
from edif_mesh.wire.envelope import body_of, kind_of
from edif_mesh.wire.messages import AskJob, CancelJob, JobSnapshot, LogLines, Manifest, Order, Refusal

if TYPE_CHECKING:
    from edif_mesh.client.mesh import Mesh

log = logging.getLogger(__name__)

_POLL_S = 2.0
_RESEND_AFTER_POLLS = 2
_FETCH_TRIES = 30


class Job:
    """One job of ours. `watch` and `result` survive restarts of coordinator and broker."""

    def __init__(self, mesh: Mesh, job: JobId, order_digest: Digest | None) -> None:
        self.id = job
        self._mesh = mesh
        self._digest = order_digest
        self._updates: asyncio.Queue[JobSnapshot | Refusal] | None = None
        self._subscription: Subscription | None = None
        self._last: JobSnapshot | None = None
        self._sink: BufferSink | None = None
        self._reader: ResultReader | None = None

    def __repr__(self) -> str:
        status = self._last.status.value if self._last else "unknown"
        return f"<Job {self.id} {status}>"

    # -------------------------------------------------------------------------------------------------------- status

    async def status(self, *, explain: bool = False) -> JobSnapshot:
        """Return the job's state now; with `explain`, why each site was or was not chosen. Raises NotFoundError."""
        from edif_mesh.client.mesh import now_ms

        self._last = await self._mesh.ask(AskJob(self.id, now_ms(), explain), JobSnapshot)
        return self._last

    async def start_watching(self) -> None:
        """Listen for updates from now on; `submit` does it before the order leaves, so that none is missed."""
        if self._subscription is None:
            self._updates = asyncio.Queue()
            self._subscription = await self._mesh.bus.subscribe(subjects.job_updates(self.id), self._on_update)

    async def stop_watching(self) -> None:
        """Listen no more."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.close()

    async def watch(self) -> AsyncIterator[JobSnapshot]:
        """Yield every new state until the terminal one. Raises RefusedError when the coordinator refuses the order."""
        await self.start_watching()
        assert self._updates is not None
        seen, silent = -1, 0
        try:
            while True:
                try:
                    update: JobSnapshot | Refusal | None = await asyncio.wait_for(self._updates.get(), _POLL_S)
                    silent = 0
                except TimeoutError:
                    silent += 1
                    update = await self._poll(silent)
                if update is None:
                    continue
                if isinstance(update, Refusal):
                    if seen < 0:
                        self._mesh.outbox.refused(self.id)
                        refused = RefusedError(update.failure.text)
                        refused.code = update.failure.code
                        raise refused
                    continue
                if update.version <= seen:
                    continue
                if seen < 0:
                    await asyncio.to_thread(self._mesh.outbox.recorded, self.id)
                seen, self._last = update.version, update
                yield update
                if update.status.terminal:
                    return
        finally:
            await self.stop_watching()

    async def wait(self, on_update: Callable[[JobSnapshot], None] | None = None) -> JobSnapshot:
        """Wait for the end and return it."""
        async for snapshot in self.watch():
            if on_update is not None:
                on_update(snapshot)
        assert self._last is not None
        return self._last

    async def cancel(self, reason: str = "cancelled by the researcher") -> JobSnapshot:
        """End the job; what runs is stopped within a second. Raises NotFoundError."""
        from edif_mesh.client.mesh import now_ms

        return await self._mesh.ask(CancelJob(self.id, now_ms(), reason), JobSnapshot)

    # -------------------------------------------------------------------------------------------------------- output

    async def listen(self, on_text: Callable[[str], Any]) -> Subscription:
        """Call `on_text` for everything that the job prints from now on."""

        async def received(incoming: Incoming) -> None:
            for line in self._open_lines(incoming.data):
                on_text(line)

        return await self._mesh.bus.subscribe(subjects.all_log_lines(self.id), received)

    async def logs(self, *, follow: bool = False) -> AsyncIterator[str]:
        """Yield what the job has printed, attempt by attempt; with `follow`, go on until it ends."""
        subject = subjects.all_log_lines(self.id)
        stored = sum((await self._mesh.streams.subjects(subjects.LOGS_STREAM, subject)).values())
        ended: asyncio.Future[Any] = asyncio.ensure_future(self.wait() if follow else asyncio.sleep(0, None))
        reader = self._mesh.streams.read(subjects.LOGS_STREAM, subject)
        count = 0
        try:
            while count < stored or follow:
                upcoming = asyncio.ensure_future(anext(reader))
                waiting: set[asyncio.Future[Any]] = {upcoming} if count < stored else {upcoming, ended}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not upcoming.done():
                    stored = sum((await self._mesh.streams.subjects(subjects.LOGS_STREAM, subject)).values())
                    if count >= stored:
                        upcoming.cancel()
                        return
                    await asyncio.wait({upcoming})
                count += 1
                for line in self._open_lines(upcoming.result().data):
                    yield line
        finally:
            ended.cancel()

    # -------------------------------------------------------------------------------------------------------- result

    async def result(
        self,
        *,
        on_update: Callable[[JobSnapshot], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        classes: dict[str, type] | None = None,
    ) -> dict[str, Any]:
        """Wait for the end and return the saved values by name.

        Raises the JobError family when there is none: UserCodeError with your own traceback, JobCancelledError,
        JobExpiredError, JobFailedError; ManifestError or ChunkError when the bytes are not what the site signed.
        """
        from edif_mesh.results.archive import read

        data = await self.archive(on_update=on_update, progress=progress)
        return dict(await asyncio.to_thread(read, data, classes))

    async def archive(
        self,
        *,
        on_update: Callable[[JobSnapshot], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> memoryview:
        """Like `result`, but the verified archive's bytes."""
        last = self._last if self._last is not None and self._last.status.terminal else await self.wait(on_update)
        return await self.fetch(self.verified_manifest(last), progress)

    def verified_manifest(self, snapshot: JobSnapshot) -> Manifest:
        """Return the manifest that the site signed for our order; raises the JobError family, ManifestError."""
        raise_for(snapshot)
        if snapshot.manifest is None:
            raise ManifestError(f"The coordinator says that {self.id} succeeded, but gave no manifest.")
        opened = self._mesh.open(snapshot.manifest, Manifest)
        manifest, site = opened.message, SiteId(opened.identity.name)
        if (order := self._order()) is not None and self._digest is not None:
            check_manifest(manifest, order, self._digest, site=site)
        elif (manifest.job, manifest.site, manifest.order_digest) != (self.id, site, snapshot.order_digest):
            raise ManifestError("The manifest belongs to another job or site; the result was not accepted.")
        check_sizes(manifest)
        return manifest

    async def follow_result(self) -> None:
        """Begin to take the result's chunks while the job still runs; `result` then has little left to fetch."""
        await self._result_reader().follow()

    async def fetch(self, manifest: Manifest, progress: Callable[[int, int], None] | None = None) -> memoryview:
        """Return the archive of a verified manifest; goes on from what it has when the link breaks.

        Raises ChunkError that names what is missing or altered, NotConnectedError when the broker stays away.
        """
        reader = self._result_reader()
        for left in reversed(range(_FETCH_TRIES)):
            try:
                await reader.read(manifest, progress)
                break
            except (NoReplyError, NotConnectedError):
                if left == 0:
                    raise
                await asyncio.sleep(0.5)
        await reader.close()
        assert self._sink is not None
        data, self._sink, self._reader = self._sink.data, None, None
        return data

    def _result_reader(self) -> ResultReader:
        if self._reader is None:
            self._sink = BufferSink()
            self._reader = ResultReader(self._mesh.bulk, self.id, self._sink)
        return self._reader

    def _order(self) -> Order | None:
        envelope = self._mesh.outbox.order(self.id)
        return decode_as(Order, body_of(envelope)) if envelope is not None else None

    async def fetch_to(self, path: Path, progress: Callable[[int, int], None] | None = None) -> int:
        """Write the archive to `path` (atomically) and return its size."""
        data = await self.archive(progress=progress)
        temporary = path.with_name(path.name + ".part")
        await asyncio.to_thread(temporary.write_bytes, data)
        temporary.replace(path)
        return len(data)

    # -------------------------------------------------------------------------------------------------------- inside

    async def _on_update(self, incoming: Incoming) -> None:
        assert self._updates is not None
        try:
            kind = kind_of(incoming.data)
            update: JobSnapshot | Refusal
            if kind == "refusal":
                update = self._mesh.open(incoming.data, Refusal).message
            else:
                update = self._mesh.open(incoming.data, JobSnapshot).message
        except EdifError as error:
            log.warning("update refused", extra={"job": self.id, "error": str(error)})
            return
        if update.job == self.id:
            self._updates.put_nowait(update)

    async def _poll(self, silent: int) -> JobSnapshot | Refusal | None:
        from edif_mesh.client.mesh import now_ms

        try:
            return await self._mesh.ask(AskJob(self.id, now_ms()), JobSnapshot)
        except NotFoundError as error:
            if silent >= _RESEND_AFTER_POLLS and not await self._resend():
                return Refusal(Failure(error.code, str(error)), self.id)
        except (TransportError, RefusedError) as error:
            log.info("no news of job", extra={"job": self.id, "error": str(error)})
        return None

    async def _resend(self) -> bool:
        try:
            return await self._mesh.resend(self.id)
        except TransportError:
            return True

    def _open_lines(self, data: bytes) -> tuple[str, ...]:
        try:
            opened = self._mesh.open(data, LogLines)
        except EdifError as error:
            log.warning("log lines refused", extra={"job": self.id, "error": str(error)})
            return ()
        lines = opened.message
        return lines.lines if lines.job == self.id and lines.site == opened.identity.name else ()


def raise_for(snapshot: JobSnapshot) -> None:
    """Raise the error of a job that ended without a result; return for one that succeeded."""
    if snapshot.status is JobStatus.SUCCEEDED:
        return
    failure = snapshot.failure or Failure("failed", snapshot.text)
    kinds: dict[JobStatus, type[JobError]] = {
        JobStatus.CANCELLED: JobCancelledError,
        JobStatus.EXPIRED: JobExpiredError,
    }
    kind = kinds.get(snapshot.status, UserCodeError if failure.code == "user_error" else JobFailedError)
    raise kind(failure.text, job=snapshot.job, code=failure.code)
