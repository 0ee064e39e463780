"""Reads a result and verifies it (the researcher's side).

Every chunk is checked against its index entry when it comes, then placed; a wrong one is named and not written. The index
is believed because the site has signed its SHA-256, in the manifest; while the job runs, because it has signed the part.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from edif_mesh.domain.ids import JobId
from edif_mesh.errors import ChunkError, ManifestError, TransportError
from edif_mesh.results.chunks import ChunkCache, Opener, checked
from edif_mesh.results.following import Follower
from edif_mesh.results.forms import FormOpener
from edif_mesh.results.index import OWN, Index
from edif_mesh.results.manifest import check_index, check_sizes, embedded_index, index_bytes
from edif_mesh.results.sources import Address, BrokerSource, Source, Way
from edif_mesh.results.transfer import index_parts
from edif_mesh.results.transfer_sinks import Sink
from edif_mesh.transport.ports import Bulk
from edif_mesh.wire.messages import Manifest, ResultPart

log = logging.getLogger(__name__)

_INLINE_BYTES = 64 << 10

Progress = Callable[[int, int], None]
R = TypeVar("R")


@dataclass(slots=True)
class ReadStats:
    """What a read cost."""

    archive_bytes: int = 0
    fetched_bytes: int = 0
    """Everything that came over the wire for this read, repeats included."""
    read_bytes: int = 0
    """Of `fetched_bytes`, what came after the manifest was known."""
    resumed_bytes: int = 0
    """What an earlier read had left behind, of the archive."""
    chunks: int = 0
    refused_chunks: int = 0
    """What another way than the broker gave and was not what the site has signed; none of it was placed."""


class ResultReader:
    """Fetches the result of one job into a sink. `follow()` may begin while the job still runs."""

    def __init__(
        self,
        bulk: Bulk,
        job: JobId,
        sink: Sink,
        *,
        patience_ms: int = 10_000,
        opener: Opener | None = None,
        open_part: Callable[[bytes], ResultPart] | None = None,
        sources: Callable[[Manifest], list[Way]] | None = None,
        cache: ChunkCache | None = None,
    ) -> None:
        """`open_part` verifies a signed part; `sources` gives further ways to the chunks, the best first."""
        self._job, self._sink = job, sink
        self._opener: Opener = opener or FormOpener()
        self._follower = Follower(bulk, job, sink, self._opener, open_part, cache)
        self._broker = BrokerSource(bulk, patience_ms)
        self._sources = sources
        self._cache = cache
        self._have: set[int] = set()
        self._have_bytes = 0
        self._stats = ReadStats()
        self._progress: Progress | None = None

    @property
    def fetched_bytes(self) -> int:
        """What has come over the wire so far."""
        return self._stats.fetched_bytes

    def holds(self, wanted: Iterable[int]) -> bool:
        """Return whether all these chunks are there."""
        return self._have.issuperset(wanted)

    @property
    def follower(self) -> Follower:
        """What is known of the result while the job still runs."""
        return self._follower

    async def follow(self) -> None:
        """Begin to take the chunks of whatever attempt runs, as they are stored; best effort, never raises for a cut.

        What it took of an attempt that did not become the result is dropped.
        """
        await self._follower.start()

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
        self._progress = progress
        index = await self.prepare(manifest)
        try:
            await self.fetch_chunks(manifest, index, range(len(index)))
            await self._at_sink(self._sink.finish, manifest.archive_bytes)
        finally:
            self._sink.close()
        return self._stats

    async def prepare(self, manifest: Manifest) -> Index:
        """Return the verified index, with the sink ready and what is there already known; raises as `read`."""
        if manifest.job != self._job:
            raise ManifestError(f"The manifest is of job {manifest.job}, not of {self._job}; nothing was fetched.")
        check_sizes(manifest)
        held = await self._follower.end(manifest)
        self._stats = ReadStats(manifest.archive_bytes, self._follower.fetched_bytes, chunks=manifest.chunks)
        index = embedded_index(manifest) or await self._index(manifest)
        followed = self._follower.placed if self._follower.attempt == manifest.attempt else None
        there = followed
        if there is None:
            there = await self._at_sink(self._sink.begin, self._job, manifest.attempt)
        self._have = {n for n, entry in there.items() if n < len(index) and entry == index.entries[n]}
        self._have_bytes = sum(index.entries[number].plain_bytes for number in self._have)
        if followed is None:
            self._stats.resumed_bytes = self._have_bytes
        self._follower.forget()
        await self._place(manifest, index, [(number, data) for number, data in held.items() if number < len(index)])
        return index

    async def close(self) -> None:
        """Stop following; what a file sink holds can be resumed. Idempotent."""
        await self._follower.end(None)
        self._sink.close()

    async def _at_sink(self, call: Callable[..., R], *given: Any) -> R:
        """Call a sink beside the event loop, unless it only touches memory."""
        return call(*given) if self._sink.in_memory else await asyncio.to_thread(call, *given)

    async def _index(self, manifest: Manifest) -> Index:
        """Fetch the index that travels apart; raises ManifestError, ChunkError."""
        raw = bytearray()
        for name, part in index_parts(bytes(index_bytes(manifest))):
            data = await self._broker.ask(Address(self._job, manifest.attempt), name)
            if data is None or len(data) != len(part):
                raise ChunkError(f"The index of the result is missing or truncated ({name}).")
            self._stats.fetched_bytes += len(data)
            raw += data
        return check_index(manifest, raw)

    # ---------------------------------------------------------------------------------------------------- fetching

    async def fetch_chunks(self, manifest: Manifest, index: Index, wanted: Iterable[int]) -> None:
        """Fetch those of the `wanted` chunks that are not there, from wherever they lie; raises as `read`."""
        missing = [number for number in wanted if number not in self._have]
        if self._cache is not None and manifest.lenders:
            cached = ((n, self._cache.get(index.entries[n].digest)) for n in missing if index.entries[n].lender != OWN)
            await self._place(manifest, index, [(number, data) for number, data in cached if data is not None])
            missing = [number for number in missing if number not in self._have]
        ours = Address(self._job, manifest.attempt)
        own = [number for number in missing if index.entries[number].lender == OWN]
        for source in self._sources(manifest) if self._sources is not None and own else ():
            try:
                await self._take(source, ours, manifest, index, own)
            except (ChunkError, OSError, TransportError) as error:
                if isinstance(error, ChunkError):
                    self._stats.refused_chunks += 1
                    source.refused(str(error))
                log.info("another way to the result is tried", extra={"job": self._job, "reason": str(error)})
            own = [number for number in own if number not in self._have]
            if not own:
                break
        await self._take(self._broker, ours, manifest, index, own)
        for place, lender in enumerate(manifest.lenders, 1):
            lent = [number for number in missing if index.entries[number].lender == place]
            await self._take(self._broker, Address(lender.job, lender.attempt), manifest, index, lent)

    async def _take(
        self,
        source: Source,
        address: Address,
        manifest: Manifest,
        index: Index,
        wanted: list[int],
    ) -> None:
        """Take the chunks from one place."""
        if not wanted:
            return
        by_number = {index.entries[number].number: number for number in wanted}
        sizes = {index.entries[number].number: index.entries[number].stored_bytes for number in wanted}
        async with aclosing(source.chunks(address, sizes)) as batches:
            async for batch in batches:
                size = sum(len(data) for _, data in batch)
                self._stats.fetched_bytes += size
                self._stats.read_bytes += size
                await self._place(manifest, index, ((by_number[n], data) for n, data in batch if n in by_number))

    async def _place(self, manifest: Manifest, index: Index, chunks: Iterable[tuple[int, memoryview]]) -> None:
        """Check and place what is new, beside the event loop; raises ChunkError for what cannot be of this result."""
        new = [(number, data) for number, data in chunks if number not in self._have]
        if not new:
            return
        if sum(len(data) for _, data in new) <= _INLINE_BYTES and self._sink.in_memory:
            self._place_now(manifest, index, new)
        else:
            await asyncio.to_thread(self._place_now, manifest, index, new)
        if self._progress is not None:
            self._progress(self._have_bytes, manifest.archive_bytes)

    def _place_now(self, manifest: Manifest, index: Index, chunks: list[tuple[int, memoryview]]) -> None:
        for number, stored in chunks:
            entry = index.entries[number]
            plain = checked(self._opener, manifest, number, entry, stored)
            self._sink.place(number, index.starts[number], entry, plain)
            if self._cache is not None:
                self._cache.add(entry.digest, stored)
            self._have.add(number)
            self._have_bytes += entry.plain_bytes
