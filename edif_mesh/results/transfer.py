"""Writes a result to the broker in chunks while it is still being produced (the site's side).

Each chunk is one durable message on a subject of its own that can be written only once, so repeating is harmless. What is
durable is announced on the way (`ResultPart`), so that a reader can check chunks before there is a manifest. A long index
travels as the chunks `index`, `index-1`, ...
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.errors import ChunkError, ResultError
from edif_mesh.results.chunks import AS_IS
from edif_mesh.results.index import CHUNK_BYTES, OWN, Entry, Index
from edif_mesh.results.manifest import ENTRIES_IN_MANIFEST, ManifestParts
from edif_mesh.transport.ports import Bulk
from edif_mesh.wire import subjects
from edif_mesh.wire.messages import Lender

WINDOW_BYTES = 32 << 20
"""Sent and not yet acknowledged; it decides the speed of a wide-area link, and is the writer's memory."""
PART_CHUNKS = 16
"""At least so often what is durable is announced."""
_INLINE_BYTES = 64 << 10
_REPEAT_MS = 60_000

Pieces = tuple[bytes | memoryview, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """A chunk in the form in which it travels; nothing to store when a lender has it."""

    entry: Entry
    stored: Pieces


class Form(Protocol):
    """Makes chunks of pieces of an archive. `make` is called in threads, for several chunks at once."""

    def make(self, number: int, plain: Sequence[memoryview], element: int) -> Made:
        """Return the chunk; `element` is the size in bytes of one number inside, 0 when it is not known."""

    def stored(self, made: Made, now_s: float, in_flight: int) -> None:
        """The broker has the chunk since `now_s` (monotonic seconds); so many others are on their way."""

    @property
    def lenders(self) -> tuple[Lender, ...]:
        """The attempts whose chunks were used again, as the manifest lists them."""

    @property
    def sealed_key(self) -> str:
        """As in the manifest."""


class AsIs:
    """Chunks travel as they are."""

    lenders: tuple[Lender, ...] = ()
    sealed_key = ""

    def make(self, number: int, plain: Sequence[memoryview], element: int) -> Made:
        """Hash the pieces; nothing is copied."""
        size = sum(len(piece) for piece in plain)
        return Made(Entry(size, size, AS_IS, 0, OWN, number, sha256(plain)), tuple(plain))

    def stored(self, made: Made, now_s: float, in_flight: int) -> None:
        """Nothing is learnt from it."""


Announce = Callable[[int, Sequence[Entry]], bytes]
"""Returns the signed `ResultPart` of these entries, whose first has that number."""


class ResultWriter:
    """One attempt's archive on its way to the broker. Not for several tasks at once."""

    def __init__(
        self,
        bulk: Bulk,
        job: JobId,
        attempt: AttemptNumber,
        *,
        form: Form | None = None,
        announce: Announce | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        if not 0 < chunk_bytes <= CHUNK_BYTES:
            raise ValueError(f"chunk_bytes must be between 1 and {CHUNK_BYTES}")
        self._bulk, self._job, self._attempt, self._chunk_bytes = bulk, job, attempt, chunk_bytes
        self._form: Form = form or AsIs()
        self._announce = announce
        self._pieces: list[memoryview] = []
        self._filled = self._element = 0
        self._window = asyncio.Semaphore(max(2, WINDOW_BYTES // chunk_bytes))
        self._chunks = 0
        self._made: dict[int, Entry] = {}
        self._stores: set[asyncio.Task[None]] = set()
        self._durable = self._announced = self._wanted = self._parts = 0
        self._done: set[int] = set()
        self._announcing: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._ended = False

    async def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data` (any size; copied unless it is `bytes` or a read-only view); waits while too much is unacknowledged.

        Raises:
            StoreFullError: the broker's store is full.
            NoReplyError, NotConnectedError: a chunk could not be stored within a minute of trying.
            ChunkError: the attempt's subject already holds other bytes.
        """
        self._check()
        view = memoryview(data)
        if not view.readonly:
            view = memoryview(bytes(view))
        while len(view):
            piece = view[: self._chunk_bytes - self._filled]
            view = view[len(piece) :]
            self._pieces.append(piece)
            self._filled += len(piece)
            if self._filled == self._chunk_bytes:
                await self._send_chunk()

    async def cut(self, element: int = 0) -> None:
        """End the chunk here, so that a reader gets all there is; numbers of `element` bytes follow. As `feed`."""
        self._check()
        if self._filled:
            await self._send_chunk()
        self._element = element
        self._wanted = self._chunks
        self._tell()

    async def finish(self) -> ManifestParts:
        """Store the rest and the index, wait until all is durable, and return what the manifest says; as `feed`."""
        self._check()
        self._announce = None
        if self._filled:
            await self._send_chunk()
        await self._settle()
        index = Index([self._made[number] for number in range(self._chunks)])
        if self._chunks > ENTRIES_IN_MANIFEST:
            for name, part in index_parts(index.pack()):
                await self._start(self._store(name, (part,), hashlib.sha256(part).digest()))
            await self._settle()
        self._ended = True
        return ManifestParts(index, self._form.lenders, self._form.sealed_key)

    async def _settle(self) -> None:
        while self._stores:
            await asyncio.wait(self._stores)
        self._check()

    def abort(self) -> None:
        """Stop sending; what was stored stays until it is purged or expires. Idempotent."""
        self._ended = True
        for task in self._stores:
            task.cancel()

    def _check(self) -> None:
        if self._failure is not None:
            self.abort()
            raise self._failure
        if self._ended:
            raise ResultError("The result was already finished or given up.")

    async def _send_chunk(self) -> None:
        pieces, self._pieces, size, self._filled = self._pieces, [], self._filled, 0
        number, self._chunks = self._chunks, self._chunks + 1
        await self._start(self._send(number, pieces, size, self._element))

    async def _send(self, number: int, pieces: list[memoryview], size: int, element: int) -> None:
        if size <= _INLINE_BYTES:
            made = self._form.make(number, pieces, element)
        else:
            made = await asyncio.to_thread(self._form.make, number, pieces, element)
        self._made[number] = made.entry
        if made.stored:
            await self._store(number, made.stored, made.entry.digest)
            self._form.stored(made, asyncio.get_running_loop().time(), len(self._stores) - 1)
        self._done.add(number)
        while self._durable in self._done:
            self._done.discard(self._durable)
            self._durable += 1
        self._tell()

    async def _start(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await self._window.acquire()
        except BaseException:
            work.close()
            raise
        task = asyncio.create_task(work)
        self._stores.add(task)
        task.add_done_callback(self._stored)

    def _stored(self, task: asyncio.Task[None]) -> None:
        self._window.release()
        self._stores.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and self._failure is None:
            self._failure = error

    async def _store(self, name: int | str, pieces: Pieces, digest: bytes) -> None:
        await store_chunk(self._bulk, subjects.result_chunk(self._job, self._attempt, name), pieces, digest)

    # --------------------------------------------------------------------------------------------------- announcing

    def _tell(self) -> None:
        """Announce what is durable, one part at a time, when a value ends in it or enough has come together."""
        ready = min(self._wanted, self._durable)
        if self._durable - self._announced >= PART_CHUNKS:
            ready = self._durable
        if self._announce is None or self._announcing is not None or ready <= self._announced:
            return
        first, self._announced = self._announced, ready
        part = self._announce(first, [self._made[number] for number in range(first, ready)])
        name, self._parts = f"part-{self._parts}", self._parts + 1
        self._announcing = asyncio.create_task(self._store(name, (part,), hashlib.sha256(part).digest()))
        self._stores.add(self._announcing)
        self._announcing.add_done_callback(self._told)

    def _told(self, task: asyncio.Task[None]) -> None:
        self._announcing = None
        self._stores.discard(task)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            self._failure = self._failure or error
            return
        self._tell()


async def store_chunk(bulk: Bulk, subject: str, pieces: Pieces, digest: bytes) -> None:
    """Store one write-once chunk; it being there already, with the same bytes, is success.

    Raises StoreFullError, NoReplyError, NotConnectedError, and ChunkError when other bytes are there.
    """
    if await bulk.store(subject, pieces, message_id=f"{subject}:{digest.hex()}", timeout_ms=_REPEAT_MS):
        return
    there = await bulk.get(subjects.RESULTS_STREAM, subject)
    if there is None or hashlib.sha256(there.data).digest() != digest:
        raise ChunkError(f"{subject} already holds other bytes; chunks are never overwritten.")


def index_parts(raw: bytes) -> list[tuple[str, bytes]]:
    """Return a packed index's chunks: (name, bytes), `index` first, then `index-1`, ..."""
    return [
        ("index" if start == 0 else f"index-{start // CHUNK_BYTES}", raw[start : start + CHUNK_BYTES])
        for start in range(0, len(raw), CHUNK_BYTES)
    ]


def sha256(pieces: Sequence[bytes | memoryview]) -> bytes:
    """Return the digest of the joined pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()
