"""Takes a result while its job still runs: chunks as they are stored, checked by the parts that the site signs.

Best effort: what it misses is fetched when there is a manifest. In memory lies only what no part has spoken of yet.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.errors import ChunkError, EdifError, NoReplyError, NotConnectedError
from edif_mesh.results.chunks import ChunkCache, Opener, checked
from edif_mesh.results.index import OWN, Entry
from edif_mesh.results.manifest import part_index
from edif_mesh.results.transfer_sinks import Sink
from edif_mesh.transport.ports import Bulk
from edif_mesh.wire import subjects
from edif_mesh.wire.messages import Manifest, ResultPart

log = logging.getLogger(__name__)

_LIVE_MESSAGES = 4
"""So many come by a plain subscription; a longer result is followed by a consumer with flow control."""
_HELD_BYTES = 64 << 20
"""The most that waits in memory for the part that speaks of it; what comes beyond is fetched again later."""
_STALL_S = 0.25
"""How long the consumer that follows may bring nothing, once there is a manifest, before the rest is asked for anew."""

OpenPart = Callable[[bytes], ResultPart]


class Follower:
    """One job's chunks as they come; only the newest attempt counts."""

    def __init__(
        self, bulk: Bulk, job: JobId, sink: Sink, opener: Opener, open_part: OpenPart | None, cache: ChunkCache | None
    ) -> None:
        self._bulk, self._job, self._sink, self._opener, self._open_part = bulk, job, sink, opener, open_part
        self._cache = cache
        self.attempt = AttemptNumber(0)
        """The newest attempt that was heard of."""
        self.fetched_bytes = 0
        self.entries: list[Entry] = []
        """Of this attempt, as far as its parts go."""
        self.starts: list[int] = [0]
        self.placed: dict[int, Entry] | None = None
        """What lies in the sink, by number; None while nothing was begun there."""
        self.on_placed: Callable[[], None] | None = None
        """Called when more of the archive lies in the sink."""
        self._held: dict[int, memoryview] = {}
        self._held_bytes = 0
        self._parts: list[bytes] = []
        self._last_part: ResultPart | None = None
        self._prefix = 0
        self._failed = False
        self._news = asyncio.Event()
        self._stop_listening: Callable[[], None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._placing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin; without a link nothing is followed."""
        with suppress(NotConnectedError, NoReplyError):
            self._stop_listening = await self._bulk.listen(
                subjects.result_chunks(self._job), self._heard, at_most=_LIVE_MESSAGES
            )

    def catch_up(self) -> None:
        """Take from the first chunk on what was stored before we listened."""
        if self._following is None:
            self._following = asyncio.create_task(self._follow_long(), name=f"follow {self._job}")

    @property
    def prefix_bytes(self) -> int:
        """How much of the archive lies in the sink without a gap."""
        return self.starts[self.prefix_chunks]

    async def end(self, manifest: Manifest | None) -> dict[int, memoryview]:
        """Stop, once what is on its way has come; return the chunks of the manifest's attempt that no part spoke of."""
        if manifest is not None:
            await self._hear_the_rest(manifest)
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
        while self._placing is not None:
            await asyncio.wait([self._placing])
        return dict(self._held) if manifest is not None and manifest.attempt == self.attempt else {}

    def forget(self) -> None:
        """Drop what is held: it was taken over."""
        self._held.clear()
        self._parts.clear()
        self._held_bytes = 0

    @property
    def prefix_chunks(self) -> int:
        """How many chunks from the first on lie in the sink without a gap."""
        count = self._prefix
        while self.placed is not None and count in self.placed:
            count += 1
        self._prefix = count
        return count

    # --------------------------------------------------------------------------------------------------- hearing

    def _heard(self, subject: str, data: memoryview) -> None:
        address = subjects.parse_result(subject)
        if address is None or address.attempt < self.attempt:
            return
        if address.attempt > self.attempt:
            self._begin_attempt(address.attempt)
        if address.name.isdigit():
            number = int(address.name)
            known = number in self._held or (self.placed is not None and number in self.placed)
            if known or self._held_bytes + len(data) > _HELD_BYTES:
                return
            self.fetched_bytes += len(data)
            self._held[number] = data
            self._held_bytes += len(data)
        elif address.name.startswith("part-") and self._open_part is not None and not self._failed:
            self._parts.append(bytes(data))
        self._news.set()
        if len(self._held) + len(self._parts) > 1:
            self.catch_up()
        self._place_more()

    def _begin_attempt(self, attempt: AttemptNumber) -> None:
        self.attempt, self.entries, self.starts, self.placed, self._prefix = attempt, [], [0], None, 0
        self._held, self._parts, self._held_bytes = {}, [], 0

    async def _follow_long(self) -> None:
        """Take a long result by a consumer with flow control, until told to stop."""
        with suppress(NotConnectedError, NoReplyError):
            async for batch in self._bulk.push(subjects.RESULTS_STREAM, subjects.result_chunks(self._job)):
                for arrived in batch:
                    self._heard(arrived.subject, arrived.data)
                if self._placing is not None and self._held_bytes > _HELD_BYTES // 2:
                    await asyncio.wait([self._placing])  # the broker waits with us

    async def _hear_the_rest(self, manifest: Manifest) -> None:
        while self._following is not None and not self._following.done() and self.attempt == manifest.attempt:
            if len(self._held) + len(self.placed or ()) >= manifest.chunks:
                return
            self._news.clear()
            try:
                async with asyncio.timeout(_STALL_S):
                    await self._news.wait()
            except TimeoutError:
                return

    # --------------------------------------------------------------------------------------------------- placing

    def _place_more(self) -> None:
        """Begin to place what can be placed, unless that is being done."""
        if self._failed or self._placing is not None:
            return
        if self._parts or any(number < len(self.entries) for number in self._held):
            self._placing = asyncio.create_task(self._place_all(), name=f"place {self._job}")
            self._placing.add_done_callback(self._placed_all)

    def _placed_all(self, task: asyncio.Task[None]) -> None:
        self._placing = None
        if task.cancelled():
            return
        if (error := task.exception()) is not None:  # a full disk: what comes now is held, up to its bound
            log.warning("a result could not be followed", extra={"job": self._job, "error": str(error)})
            self._failed = True
            return
        self._place_more()  # what came between its last look and its end

    async def _place_all(self) -> None:
        """Place what the parts speak of, until there is nothing new."""
        while True:
            parts, self._parts = self._parts, []
            of = [part for raw in parts if (part := self._opened(raw)) is not None]
            if of:
                self._last_part = of[-1]
            ready = [number for number in self._held if number < len(self.entries)]
            if not ready:
                return
            attempt = self.attempt
            if self.placed is None:
                there = await asyncio.to_thread(self._sink.begin, self._job, attempt)
                if attempt != self.attempt:
                    continue
                self.placed = there
            chunks = [(n, self.starts[n], self.entries[n], self._held[n]) for n in ready]
            good = await asyncio.to_thread(self._place_now, chunks)
            if attempt != self.attempt:
                continue
            for number, _, _, data in chunks:
                if self._held.pop(number, None) is not None:
                    self._held_bytes -= len(data)
            self.placed.update({number: self.entries[number] for number in good})
            self._news.set()
            if self.on_placed is not None:
                self.on_placed()

    def _opened(self, raw: bytes) -> ResultPart | None:
        """Take a part's entries; None for one that is not to be believed, or does not follow the last."""
        assert self._open_part is not None
        try:
            part = self._open_part(raw)
            index = part_index(part)
        except EdifError as error:
            log.warning("part refused", extra={"job": self._job, "error": str(error)})
            return None
        if part.attempt != self.attempt or part.first != len(self.entries):
            return None
        for entry in index.entries:
            self.entries.append(entry)
            self.starts.append(self.starts[-1] + entry.plain_bytes)
        return part

    def _place_now(self, chunks: list[tuple[int, int, Entry, memoryview]]) -> list[int]:
        """Check and place; a chunk that is wrong is left out, and named when the manifest is there."""
        assert self._last_part is not None
        good = []
        for number, start, entry, stored in chunks:
            if entry.lender != OWN:
                continue
            try:
                plain = checked(self._opener, self._last_part, number, entry, stored)
            except ChunkError as error:
                log.warning("chunk refused", extra={"job": self._job, "error": str(error)})
                continue
            self._sink.place(number, start, entry, plain)
            if self._cache is not None:
                self._cache.add(entry.digest, stored)
            good.append(number)
        return good
