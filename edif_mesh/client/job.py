"""A job handle: follow it, read what it prints, take its result, cancel it; from this process or any later one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edif_mesh.client.lines import LineFollower, stored_lines
from edif_mesh.domain.attempt import Receipt
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
    ResultGoneError,
    TransportError,
    UserCodeError,
    WireError,
)
from edif_mesh.results.forms import FormOpener
from edif_mesh.results.manifest import check_manifest, check_sizes
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import BufferSink, FileSink, Sink, forget, make_room
from edif_mesh.transport.ports import Incoming, Subscription
from edif_mesh.wire import subjects
from edif_mesh.wire.codec import decode_as
from edif_mesh.wire.envelope import body_of, kind_of
from edif_mesh.wire.messages import AskJob, CancelJob, DeleteJob, JobSnapshot, Manifest, Order, Refusal, ResultPart

if TYPE_CHECKING:
    from edif_mesh.client.mesh import Mesh
    from edif_mesh.results.lazy import LazyResult
    from edif_mesh.results.lazy_tensor import Run

log = logging.getLogger(__name__)

_POLL_S = 2.0
_ON_ITS_WAY_S, _ASK_AGAIN_S = 5.0, 0.05
"""How long `status` waits for an order that was just sent, and how often it asks."""
_FETCH_TRIES = 30
MEMORY_BYTES = 1 << 30
_TELLING_BYTES = 4 << 20
"""A download of so much says how fast our link is."""
_INLINE_BYTES = 64 << 10
"""A smaller archive is read faster than a thread is woken."""


class Job:
    """One job of ours. `watch` and `result` survive restarts of coordinator and broker."""

    def __init__(self, mesh: Mesh, job: JobId, order_digest: Digest | None) -> None:
        self.id = job
        self._mesh = mesh
        self._digest = order_digest
        self._queues: list[asyncio.Queue[JobSnapshot | Refusal]] = []
        self._primed: asyncio.Queue[JobSnapshot | Refusal] | None = None
        self._subscription: Subscription | None = None
        self._last: JobSnapshot | None = None
        self._sink: BufferSink | None = None
        self.memory_bytes = MEMORY_BYTES
        """A larger result is mapped from a file instead of being held in memory."""
        self._reader: ResultReader | None = None
        self.printing: LineFollower | None = None
        self.storing: asyncio.Future[None] | None = None
        """The payload on its way to the broker, until the order follows it."""

    def __repr__(self) -> str:
        status = self._last.status.value if self._last else "unknown"
        return f"<Job {self.id} {status}>"

    # -------------------------------------------------------------------------------------------------------- status

    async def status(self, *, explain: bool = False, patience_s: float = _ON_ITS_WAY_S) -> JobSnapshot:
        """Return the job's state now; with `explain`, why each site was or was not chosen.

        An order that has just left this machine is waited for, `patience_s` seconds at most, until a coordinator knows it.
        Raises NotFoundError, also when it is still on its way then; RefusedError when the coordinator refused it.
        """
        until = time.monotonic() + patience_s
        while True:
            waits = self._mesh.outbox.waits(self.id)  # before we ask: it may be recorded in the meantime
            try:
                self._last = await self._ask(AskJob(self.id, now_ms(), explain))
                return self._last
            except NotFoundError:
                if (failure := self._mesh.outbox.refusal(self.id)) is not None:
                    raise refused_by(failure) from None
                if not waits or time.monotonic() >= until:
                    raise
            await asyncio.sleep(_ASK_AGAIN_S)

    async def start_watching(self) -> None:
        """Listen for updates from now on; `submit` does it before the order leaves, so that none is missed."""
        if self._primed is None:
            self._primed = asyncio.Queue()
            self._queues.append(self._primed)
        await self._subscribe()

    async def close(self) -> None:
        """Listen no more, and drop what was fetched ahead. The job itself goes on."""
        if self.storing is not None:
            self.storing.cancel()
            await asyncio.gather(self.storing, return_exceptions=True)
        self._queues.clear()
        self._primed = None
        await self._unsubscribe()
        if self.printing is not None:
            await self.printing.close()
        await self._drop_reader()

    async def watch(self) -> AsyncIterator[JobSnapshot]:
        """Yield every new state until the terminal one; goes on through restarts of coordinator and broker.

        Raises RefusedError when the coordinator refuses the order, NotFoundError when it knows no such job.
        """
        submitted_here, self._primed = self._primed, None
        updates = submitted_here if submitted_here is not None else asyncio.Queue()
        if submitted_here is None:
            self._queues.append(updates)
        seen, silent = (-1, -1), 0
        wait_s = _POLL_S if submitted_here is not None else 0.0
        try:
            while True:
                await self._subscribe()
                try:
                    update: JobSnapshot | Refusal | None = await asyncio.wait_for(updates.get(), wait_s)
                    silent = 0
                except TimeoutError:
                    silent += 1
                    update = await self._poll(silent)
                wait_s = _POLL_S
                if isinstance(update, Refusal):
                    if seen[0] < 0:
                        await asyncio.to_thread(self._mesh.outbox.refused, self.id, update.failure)
                        raise refused_by(update.failure)
                    continue
                if update is None or (update.epoch, update.version) <= seen:
                    continue
                if seen[0] < 0:
                    await asyncio.to_thread(self._mesh.outbox.recorded, self.id)
                seen, self._last = (update.epoch, update.version), update
                yield update
                if update.status.terminal:
                    return
        finally:
            with contextlib.suppress(ValueError):
                self._queues.remove(updates)
            if not self._queues:
                await self._unsubscribe()

    async def wait(self, on_update: Callable[[JobSnapshot], None] | None = None) -> JobSnapshot:
        """Wait for the end and return it."""
        async for snapshot in self.watch():
            if on_update is not None:
                on_update(snapshot)
        assert self._last is not None
        return self._last

    async def cancel(self, reason: str = "cancelled by the researcher") -> JobSnapshot:
        """End the job; what runs is stopped within a second. Raises NotFoundError."""
        return await self._ask(CancelJob(self.id, now_ms(), reason))

    async def delete(self) -> JobSnapshot:
        """Have the mesh delete the job's payload, result and printed lines, everywhere; what is in our cache goes at once.

        Its record stays: who ran what, where and when. Raises NotFoundError, and RefusedError while the job runs.
        """
        snapshot = await self._ask(DeleteJob(self.id, now_ms()))
        await asyncio.to_thread(forget, self._mesh.cache_dir, self.id)
        return snapshot

    async def receipt(self) -> Receipt | None:
        """Return what the newest attempt has used, or None before a site has said so.

        Of a job that succeeded it comes from the manifest, whose signature by the site is verified here. Otherwise it is
        the coordinator's word, which has verified the site's signed report. Raises NotFoundError, ManifestError.
        """
        last = await self.status()
        if last.status is JobStatus.SUCCEEDED:
            return self.verified_manifest(last).receipt
        return next((attempt.receipt for attempt in reversed(last.attempts) if attempt.receipt is not None), None)

    # -------------------------------------------------------------------------------------------------------- output

    async def listen(self, on_line: Callable[[str], object], *, before_it_runs: bool = False) -> LineFollower:
        """Call `on_line` for every line that the job prints, earlier ones too once a new one comes or it is finished."""
        self.printing = LineFollower(self._mesh, self.id, on_line)
        await self.printing.start(before_it_runs=before_it_runs)
        return self.printing

    async def logs(self, *, follow: bool = False) -> AsyncIterator[str]:
        """Yield the lines that the job has printed, attempt by attempt; with `follow`, go on until it ends."""
        if not follow:
            async for message in stored_lines(self._mesh, self.id):
                for line in message.lines:
                    yield line
            return
        lines: asyncio.Queue[str | None] = asyncio.Queue()
        follower = LineFollower(self._mesh, self.id, lines.put_nowait)
        await follower.start()

        async def until_the_end() -> None:
            try:
                await follower.fill()
                await self.wait()
                await follower.fill()
            finally:
                lines.put_nowait(None)

        ending = asyncio.create_task(until_the_end())
        try:
            while (text := await lines.get()) is not None:
                yield text
            await ending
        finally:
            ending.cancel()
            await follower.close()

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
        from edif_mesh.results.archive import read  # takes torch with it, seconds when it is the first

        data = await self.archive(on_update=on_update, progress=progress)
        if len(data) <= _INLINE_BYTES:
            return dict(read(data, classes))
        return dict(await asyncio.to_thread(read, data, classes))

    async def archive(
        self,
        *,
        on_update: Callable[[JobSnapshot], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> memoryview:
        """Like `result`, but the verified archive's bytes."""
        last = await self._ended(on_update)
        try:
            manifest = self.verified_manifest(last)
        except EdifError:
            await self._drop_reader()
            raise
        return await self.fetch(manifest, progress)

    def verified_manifest(self, snapshot: JobSnapshot) -> Manifest:
        """Return the manifest that the site signed for our order; raises the JobError family, ManifestError."""
        raise_for(snapshot)
        if snapshot.deleted_at_ms is not None or (snapshot.manifest is None and snapshot.keep_until_ms is not None):
            raise ResultGoneError(f"{self.id}: {snapshot.text} Run the job again to get its values.")
        if snapshot.manifest is None:
            raise ManifestError(f"The coordinator says that {self.id} succeeded, but gave no manifest.")
        opened = self._mesh.open(snapshot.manifest, Manifest)
        manifest, site = opened.message, SiteId(opened.identity.name)
        if (order := self.order()) is not None and self._digest is not None:
            check_manifest(manifest, order, self._digest, site=site)
        elif (manifest.job, manifest.site, manifest.order_digest) != (self.id, site, snapshot.order_digest):
            raise ManifestError("The manifest belongs to another job or site; the result was not accepted.")
        check_sizes(manifest)
        return manifest

    async def live(self) -> AsyncIterator[tuple[str, Any]]:
        """Yield (name, value) of each saved tensor as it leaves the running job, until the job ends.

        A part of a saved list or dictionary is called as you would write it: `acts[3]`. The bytes are what the site has signed,
        but not the last word: the block may still change a value, another attempt may take over. `result` has what counts.
        Raises as `wait`, ArchiveError for bytes that are none of ours.
        """
        from edif_mesh.results.archive import leaf_value
        from edif_mesh.results.archive_records import RecordReader

        reader, news = self._result_reader(), asyncio.Event()
        follower, sink = reader.follower, self._sink
        assert sink is not None
        follower.on_placed = news.set
        await reader.follow()
        follower.catch_up()
        ending = asyncio.create_task(self.wait())
        ending.add_done_callback(lambda _: news.set())
        attempt, records = follower.attempt, RecordReader(sink.read)
        try:
            while True:
                news.clear()
                if follower.attempt != attempt:
                    attempt, records = follower.attempt, RecordReader(sink.read)
                for leaf in records.leaves(follower.prefix_bytes) if follower.placed is not None else ():
                    yield leaf.name, leaf_value(leaf, [sink.read(start, size) for start, size in leaf.storages])
                    if follower.attempt != attempt:
                        break
                if ending.done():
                    ending.result()
                    return
                await news.wait()
        finally:
            follower.on_placed = None
            ending.cancel()

    async def follow_result(self) -> None:
        """Begin to take the result's chunks while the job still runs; `result` then has little left to fetch."""
        await self._result_reader().follow()

    async def fetch(self, manifest: Manifest, progress: Callable[[int, int], None] | None = None) -> memoryview:
        """Return the archive of a verified manifest; goes on from what it has when the link breaks.

        Raises ChunkError that names what is missing or altered, NotConnectedError when the broker stays away.
        """
        reader = self._result_reader()
        await self._read(reader, manifest, progress)
        assert self._sink is not None
        data = self._sink.data
        await self._drop_reader()
        return data

    async def open(self, *, classes: dict[str, type] | None = None, run: Run | None = None) -> LazyResult:
        """Wait for the end and open the result, of which only the structure is fetched now: `(await job.open())["acts"]`.

        Of a `LazyTensor` what is indexed is fetched, once: it stays in the cache folder, from which a later `open`, also of
        another process, goes on. Without `run` (see `BlockingJob.open`) indexing is `await tensor.at(...)`. Raises as `result`.
        """
        from edif_mesh.results.lazy import no_waiting, open_result

        await self._drop_reader()
        last = await self._ended()
        manifest = self.verified_manifest(last)
        folder = self._mesh.cache_dir
        await asyncio.to_thread(make_room, folder, manifest.archive_bytes)
        sink = FileSink(folder / f"{self.id}.{manifest.attempt}.edif", or_nameless=True)
        return await open_result(self._reader_into(sink), sink, manifest, run or no_waiting, classes)

    async def fetch_to(
        self,
        path: Path,
        *,
        on_update: Callable[[JobSnapshot], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Wait for the end, write the verified archive to `path` and return its size in bytes.

        Until it is complete it lies beside it as `.part`; a later call, also of another process, goes on from there. No more
        than a few chunks are in memory. Raises as `result`, and StoreFullError when the disk is full.
        """
        await self._drop_reader()
        last = await self._ended(on_update)
        manifest = self.verified_manifest(last)
        await self._read(self._reader_into(FileSink(path)), manifest, progress)
        return manifest.archive_bytes

    def _result_reader(self) -> ResultReader:
        if self._reader is None:
            self._sink = BufferSink(self._mesh.cache_dir, self.memory_bytes)
            self._reader = self._reader_into(self._sink)
        return self._reader

    def _reader_into(self, sink: Sink) -> ResultReader:
        order = self.order()
        # An order of another machine may have been sealed: its manifest says so.
        sealed = order is None or bool(order.results.seal_to)
        opener = FormOpener(self._mesh.key.sealing_key(self.id) if sealed else None, demanded=order is not None)
        return ResultReader(
            self._mesh.bulk,
            self.id,
            sink,
            open_part=self._open_part,
            opener=opener,
            sources=self._mesh.paths.sources,
            cache=self._mesh.chunks if order is not None and order.results.session else None,
        )

    async def _read(
        self, reader: ResultReader, manifest: Manifest, progress: Callable[[int, int], None] | None
    ) -> None:
        """Read, and go on while the broker comes and goes; raises as `fetch`."""
        for left in reversed(range(_FETCH_TRIES)):
            began = time.monotonic()
            try:
                stats = await reader.read(manifest, progress)
            except (NoReplyError, NotConnectedError):
                if left == 0:
                    raise
                await asyncio.sleep(0.5)
                continue
            if stats.read_bytes >= _TELLING_BYTES:
                self._mesh.link_bytes_per_s = stats.read_bytes / (time.monotonic() - began)
            return

    def _open_part(self, raw: bytes) -> ResultPart:
        """Return what a site has signed of a running attempt; raises EdifError when it is not of our job."""
        opened = self._mesh.open(raw, ResultPart)
        part = opened.message
        wanted = (self.id, SiteId(opened.identity.name), self._digest or part.order_digest)
        if (part.job, part.site, part.order_digest) != wanted:
            raise ManifestError("The part is of another job, site or order.")
        return part

    def order(self) -> Order | None:
        """Return the order as it was signed here, or None when it was signed elsewhere."""
        envelope = self._mesh.outbox.order(self.id)
        return decode_as(Order, body_of(envelope)) if envelope is not None else None

    # -------------------------------------------------------------------------------------------------------- inside

    async def _ended(self, on_update: Callable[[JobSnapshot], None] | None = None) -> JobSnapshot:
        """Return the terminal state, waited for where it is not known yet."""
        if self._last is not None and self._last.status.terminal:
            return self._last
        return await self.wait(on_update)

    async def _subscribe(self) -> None:
        """Subscribe unless done; without a link the polls of `watch` stand in until there is one."""
        if self._subscription is None:
            with contextlib.suppress(NotConnectedError):
                self._subscription = await self._mesh.bus.subscribe(subjects.job_updates(self.id), self._on_update)

    async def _unsubscribe(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.close()

    async def _on_update(self, incoming: Incoming) -> None:
        update: JobSnapshot | Refusal
        try:
            if kind_of(incoming.data) == "refusal":
                update = self._mesh.open_refusal(incoming.data)
            else:
                update = self._mesh.open(incoming.data, JobSnapshot).message
        except EdifError as error:
            log.warning("update refused", extra={"job": self.id, "error": str(error)})
            return
        if update.job == self.id:
            for queue in self._queues:
                queue.put_nowait(update)

    async def _ask(self, question: AskJob | CancelJob | DeleteJob) -> JobSnapshot:
        answer = await self._mesh.ask(question, JobSnapshot)
        if answer.job != self.id:
            raise WireError(f"The answer is about {answer.job}, not about {self.id}; it was not accepted.")
        return answer

    async def _poll(self, silent: int) -> JobSnapshot | None:
        """Ask for news; sends the order again, ever more rarely, while the coordinator does not know it."""
        waits = self._mesh.outbox.waits(self.id)  # before we ask: it may be recorded in the meantime
        try:
            return await self.status(patience_s=0)
        except NotFoundError:
            if not waits:
                raise
            if silent & (silent - 1) == 0:
                with contextlib.suppress(TransportError):
                    await self._mesh.resend(self.id)
        except EdifError as error:
            if self._mesh.outbox.refusal(self.id) is not None:
                raise
            log.info("no news of job", extra={"job": self.id, "error": str(error)})
        return None

    async def _drop_reader(self) -> None:
        reader, self._reader, self._sink = self._reader, None, None
        if reader is not None:
            await reader.close()


def refused_by(failure: Failure) -> RefusedError:
    """Return a refusal of the coordinator as the error to raise."""
    error = NotFoundError(failure.text) if failure.code == "not_found" else RefusedError(failure.text)
    error.code = failure.code
    return error


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


def now_ms() -> int:
    """Return the time, Unix UTC, in ms."""
    return time.time_ns() // 1_000_000
