"""Reads a result from the broker and verifies it (the researcher's side).

Bytes are only placed as they come; they count once the SHA-256 over all chunk digests equals the root of the manifest,
which the caller has verified. If it does not, the index tells which chunk is wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.errors import ChunkError, ManifestError, NoReplyError, NotConnectedError
from edif_mesh.results.manifest import check_sizes, chunk_size, root_of
from edif_mesh.results.transfer import index_parts
from edif_mesh.results.transfer_sinks import Sink
from edif_mesh.transport.ports import Arrived, Bulk
from edif_mesh.wire import subjects
from edif_mesh.wire.messages import Manifest

log = logging.getLogger(__name__)

_LIVE_CHUNKS = 4
"""So many come by a plain subscription; a longer result is followed by a consumer with flow control."""
_EARLY_BYTES = 512 << 20
"""The most of a running attempt that is kept in memory before its manifest is known."""
_STALL_S = 0.25
"""How long the consumer that follows may bring nothing before the rest is asked for anew."""
_DIRECT_CHUNKS = 4
"""When no more are missing, each is asked for by name."""
_AT_ONCE = 8

Progress = Callable[[int, int], None]
R = TypeVar("R")


@dataclass(slots=True)
class ReadStats:
    """What a read cost."""

    archive_bytes: int = 0
    fetched_bytes: int = 0
    """Everything that came over the wire for this read, repeats included."""
    resumed_bytes: int = 0
    """What an earlier read had left behind."""
    chunks: int = 0


class ResultReader:
    """Fetches the result of one job into a sink. `follow()` may begin while the job still runs."""

    def __init__(self, bulk: Bulk, job: JobId, sink: Sink, *, patience_ms: int = 10_000) -> None:
        self._bulk, self._job, self._sink = bulk, job, sink
        self._patience_s = patience_ms / 1000
        self._early: dict[AttemptNumber, dict[int, memoryview]] = {}
        self._early_digests: dict[tuple[AttemptNumber, int], bytes] = {}
        self._following: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._stop_listening: Callable[[], None] = _nothing
        self._attempt = AttemptNumber(0)
        self._digests: dict[int, bytes] = {}
        self._stats = ReadStats()
        self._progress: Progress | None = None

    async def follow(self) -> None:
        """Begin to take the chunks of whatever attempt runs, as they are stored; best effort, never raises for a cut.

        What it took of an attempt that did not become the result is dropped.
        """
        with suppress(NotConnectedError, NoReplyError):
            self._stop_listening = await self._bulk.listen(
                subjects.result_chunks(self._job), self._heard, at_most=_LIVE_CHUNKS
            )

    async def read(self, manifest: Manifest, progress: Progress | None = None) -> ReadStats:
        """Fetch what is missing, verify all of it, and complete the sink; `progress(bytes, of_bytes)` on the way.

        `manifest` must have been verified (signature, and `check_manifest`). May be called again after an error:
        it goes on where it stopped.

        Raises:
            ManifestError: the manifest is of another job, or its sizes lie.
            ChunkError: a chunk is missing, altered, foreign or has the wrong length; the text names it.
            NotConnectedError, NoReplyError: the broker was away for too long.
            StoreFullError: the sink's disk is full.
        """
        if manifest.job != self._job:
            raise ManifestError(f"The manifest is of job {manifest.job}, not of {self._job}; nothing was fetched.")
        check_sizes(manifest)
        await self._hear_the_rest(manifest)
        await self._end_following()
        self._progress = progress
        self._stats = ReadStats(manifest.archive_bytes, self._stats.fetched_bytes, 0, manifest.chunks)
        self._digests = await self._at_sink(self._sink.begin, manifest)
        self._stats.resumed_bytes = sum(chunk_size(manifest, number) for number in self._digests)
        try:
            early = self._early.pop(manifest.attempt, {})
            known = {n: digest for (attempt, n), digest in self._early_digests.items() if attempt == manifest.attempt}
            await self._place(manifest, early.items(), known)
            await self._fetch(manifest)
            await self._verify(manifest)
            await self._at_sink(self._sink.finish)
        finally:
            self._early.clear()
            self._early_digests.clear()
            self._sink.close()
        return self._stats

    async def _at_sink(self, call: Callable[..., R], *given: Any) -> R:
        """Call a sink beside the event loop, unless it only touches memory."""
        return call(*given) if self._sink.in_memory else await asyncio.to_thread(call, *given)

    async def close(self) -> None:
        """Stop following; what a file sink holds can be resumed. Idempotent."""
        await self._end_following()
        self._sink.close()

    # --------------------------------------------------------------------------------------------------- following

    def _heard(self, subject: str, data: memoryview) -> None:
        address = subjects.parse_result(subject)
        if address is None or not address.name.isdigit():
            return
        if address.attempt > self._attempt:
            self._attempt = address.attempt
            self._early.clear()
            self._early_digests.clear()
        if address.attempt == self._attempt:
            self._stats.fetched_bytes += len(data)
            # The first stays: its digest may already be known.
            self._early.setdefault(address.attempt, {}).setdefault(int(address.name), data)
            self._news.set()
            if self._following is None and len(self._early[address.attempt]) > 1:
                self._following = asyncio.create_task(self._follow_long(), name=f"follow {self._job}")

    async def _follow_long(self) -> None:
        """Take a long result by a consumer with flow control, until told to stop or enough is in memory."""
        kept = 0
        filter_subject = subjects.result_chunks(self._job)
        with suppress(NotConnectedError, NoReplyError):
            async for batch in self._bulk.push(subjects.RESULTS_STREAM, filter_subject):
                for arrived in batch:
                    address = subjects.parse_result(arrived.subject)
                    if address is None or address.attempt < self._attempt or not address.name.isdigit():
                        continue
                    number = int(address.name)
                    if number in self._early.get(address.attempt, {}):
                        continue
                    self._heard(arrived.subject, arrived.data)
                    kept += len(arrived.data)
                await self._hash_early()
                if kept > _EARLY_BYTES:
                    return

    async def _hash_early(self) -> None:
        """Hash what has come while the job runs, beside the event loop."""
        attempt, chunks = self._attempt, dict(self._early.get(self._attempt, {}))
        new = {n: data for n, data in chunks.items() if (attempt, n) not in self._early_digests}
        digests = await asyncio.to_thread(lambda: {n: hashlib.sha256(data).digest() for n, data in new.items()})
        if attempt == self._attempt:
            self._early_digests |= {(attempt, n): digest for n, digest in digests.items()}

    async def _hear_the_rest(self, manifest: Manifest) -> None:
        """Let the consumer that follows bring what is on its way, for as long as it brings anything."""
        while self._following is not None and not self._following.done() and self._attempt == manifest.attempt:
            if len(self._early.get(manifest.attempt, ())) >= manifest.chunks:
                return
            self._news.clear()
            try:
                async with asyncio.timeout(_STALL_S):
                    await self._news.wait()
            except TimeoutError:
                return

    async def _end_following(self) -> None:
        self._stop_listening()
        self._stop_listening = _nothing
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following

    # ---------------------------------------------------------------------------------------------------- fetching

    async def _fetch(self, manifest: Manifest) -> None:
        missing = self._missing(manifest)
        if len(missing) > _DIRECT_CHUNKS:
            start = 1
            if self._digests:
                first = await self._ask(manifest, missing[0])
                start = first.sequence if first is not None else 1
            await self._fetch_by_push(manifest, start)
        await self._fetch_by_name(manifest)

    async def _fetch_by_push(self, manifest: Manifest, start: int) -> None:
        """Take chunks as the broker pushes them, until the rest lies behind us or none comes any more."""
        filter_subject = subjects.result_chunks(self._job, manifest.attempt)
        heard_at = time.monotonic()
        async with aclosing(self._bulk.push(subjects.RESULTS_STREAM, filter_subject, start=start)) as pushing:
            async for batch in pushing:
                if batch:
                    heard_at = time.monotonic()
                    self._stats.fetched_bytes += sum(len(arrived.data) for arrived in batch)
                    await self._place(manifest, _numbered(batch))
                if len(self._digests) == manifest.chunks or (not batch and await self._all_are_there(manifest)):
                    return
                if time.monotonic() - heard_at > self._patience_s:
                    return

    async def _all_are_there(self, manifest: Manifest) -> bool:
        """Whether the broker holds everything that is missing here, so that it must have been pushed past us."""
        subject = subjects.result_chunks(self._job, manifest.attempt)
        try:
            names = await self._bulk.names(subjects.RESULTS_STREAM, subject)
        except (NotConnectedError, NoReplyError):
            return False
        wanted = (subjects.result_chunk(self._job, manifest.attempt, n) for n in self._missing(manifest))
        return all(name in names for name in wanted)

    async def _fetch_by_name(self, manifest: Manifest) -> None:
        """Ask for each missing chunk, some at once, until all are there or our patience ends."""
        deadline = time.monotonic() + self._patience_s
        while missing := self._missing(manifest):
            for some in (missing[i : i + _AT_ONCE] for i in range(0, len(missing), _AT_ONCE)):
                arrived = await asyncio.gather(*(self._ask(manifest, number) for number in some))
                found = [(n, one.data) for n, one in zip(some, arrived, strict=True) if one is not None]
                if found:
                    deadline = time.monotonic() + self._patience_s
                await self._place(manifest, found)
            if not (missing := self._missing(manifest)):
                return
            if time.monotonic() > deadline:
                raise ChunkError(f"Of the result's {manifest.chunks} chunks {_named(missing)} missing at the broker.")
            await asyncio.sleep(0.2)

    async def _ask(self, manifest: Manifest, name: int | str) -> Arrived | None:
        """Return one chunk by name; repeats while the broker is away, at most as long as our patience."""
        deadline = time.monotonic() + max(self._patience_s, 10)
        while True:
            try:
                subject = subjects.result_chunk(self._job, manifest.attempt, name)
                arrived = await self._bulk.get(subjects.RESULTS_STREAM, subject)
            except (NotConnectedError, NoReplyError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)
                continue
            if arrived is not None:
                self._stats.fetched_bytes += len(arrived.data)
            return arrived

    def _missing(self, manifest: Manifest) -> list[int]:
        if len(self._digests) == manifest.chunks:
            return []
        return [number for number in range(manifest.chunks) if number not in self._digests]

    async def _place(
        self, manifest: Manifest, chunks: Iterable[tuple[int, memoryview]], known: Mapping[int, bytes] | None = None
    ) -> None:
        """Hash and place what is new, beside the event loop; raises ChunkError for what cannot be of this result."""
        new: list[tuple[int, memoryview]] = []
        for number, data in chunks:
            if number >= manifest.chunks:
                raise ChunkError(f"Chunk {number} is foreign: the manifest has only {manifest.chunks} chunks.")
            if len(data) != chunk_size(manifest, number):
                wanted = chunk_size(manifest, number)
                raise ChunkError(f"Chunk {number} has {len(data)} bytes instead of {wanted}; it was not accepted.")
            if number not in self._digests:
                new.append((number, data))
        if not new:
            return
        if len(new) == 1 and len(new[0][1]) <= 64 << 10:
            self._digests |= self._place_now(new, known or {})
        else:
            self._digests |= await asyncio.to_thread(self._place_now, new, known or {})
        if self._progress is not None:
            done = min(len(self._digests) * manifest.chunk_bytes, manifest.archive_bytes)
            self._progress(done, manifest.archive_bytes)

    def _place_now(self, chunks: list[tuple[int, memoryview]], known: Mapping[int, bytes]) -> dict[int, bytes]:
        placed = {}
        for number, data in chunks:
            placed[number] = known.get(number) or hashlib.sha256(data).digest()
            self._sink.place(number, data, placed[number])
        return placed

    # ---------------------------------------------------------------------------------------------------- verifying

    async def _verify(self, manifest: Manifest) -> None:
        digests = [self._digests[number] for number in range(manifest.chunks)]
        if root_of(digests) == manifest.root:
            return
        await asyncio.to_thread(self._sink.forget)
        told = await self._index(manifest)
        wrong = [number for number in range(manifest.chunks) if told[number] != digests[number]]
        raise ChunkError(f"Of the result's {manifest.chunks} chunks {_named(wrong)} altered; nothing was accepted.")

    async def _index(self, manifest: Manifest) -> list[bytes]:
        """Return the digests of the index, verified against the root; raises ChunkError."""
        if manifest.chunks == 1:
            raise ChunkError("The result's only chunk, 0, is altered; nothing was accepted.")
        raw = bytearray()
        for name, part in index_parts([bytes(32)] * manifest.chunks, manifest.chunk_bytes):
            arrived = await self._ask(manifest, name)
            if arrived is None or len(arrived.data) != len(part):
                raise ChunkError(f"The result is altered, and its index is missing or truncated ({name}).")
            raw += arrived.data
        digests = [bytes(raw[start : start + 32]) for start in range(0, len(raw), 32)]
        if root_of(digests) != manifest.root:
            raise ChunkError("The result is altered, and its index does not fit the manifest either.")
        return digests


def _nothing() -> None:
    """Stop nothing: there is no subscription."""


def _numbered(batch: list[Arrived]) -> list[tuple[int, memoryview]]:
    found = []
    for arrived in batch:
        address = subjects.parse_result(arrived.subject)
        if address is not None and address.name.isdigit():
            found.append((int(address.name), arrived.data))
        elif address is None or not address.name.startswith("index"):
            raise ChunkError(f"A foreign chunk lies among the result's: {arrived.subject}.")
    return found


def _named(numbers: list[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    return f"{shown} {'is' if len(numbers) == 1 else 'are'}"
