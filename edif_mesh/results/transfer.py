"""Writes a result to the broker in chunks while it is still being produced (the site's side).

Each chunk is one durable message on a subject of its own that can be written only once, so repeating is harmless. The
digests of all chunks travel as the chunks `index`, `index-1`, ...; a result of one chunk needs none, since its only
digest follows from the chunk itself.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.errors import ChunkError, ResultError
from edif_mesh.results.manifest import MAX_CHUNK_BYTES, ManifestParts, root_of
from edif_mesh.transport.ports import Bulk
from edif_mesh.wire import subjects

CHUNK_BYTES = 960 << 10
"""Every chunk costs the broker one flush to disk: nearly as large as its `max_payload` of 1 MiB allows."""
WINDOW_BYTES = 32 << 20
"""Sent and not yet acknowledged; it decides the speed of a wide-area link, and is the writer's memory."""
_INLINE_HASH_BYTES = 64 << 10
_REPEAT_MS = 60_000


class ResultWriter:
    """One attempt's archive on its way to the broker. Not for several tasks at once."""

    def __init__(self, bulk: Bulk, job: JobId, attempt: AttemptNumber, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        if not 0 < chunk_bytes <= MAX_CHUNK_BYTES:
            raise ValueError(f"chunk_bytes must be between 1 and {MAX_CHUNK_BYTES}")
        self._bulk, self._job, self._attempt, self._chunk_bytes = bulk, job, attempt, chunk_bytes
        self._pieces: list[memoryview] = []
        self._filled = 0
        self._total = 0
        self._window = asyncio.Semaphore(max(2, WINDOW_BYTES // chunk_bytes))
        self._hashes: list[asyncio.Task[bytes]] = []
        self._stores: set[asyncio.Task[None]] = set()
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
        self._total += len(view)
        while len(view):
            piece = view[: self._chunk_bytes - self._filled]
            view = view[len(piece) :]
            self._pieces.append(piece)
            self._filled += len(piece)
            if self._filled == self._chunk_bytes:
                await self._send_chunk()

    async def finish(self) -> ManifestParts:
        """Store the rest and the index, wait until all is durable, and return what the manifest says; as `feed`."""
        self._check()
        if self._filled:
            await self._send_chunk()
        digests = [await task for task in self._hashes]
        if len(digests) > 1:
            for name, part in index_parts(digests, self._chunk_bytes):
                await self._start(self._store(name, [part], hashlib.sha256(part).digest()))
        while self._stores:
            await asyncio.wait(self._stores)
        self._check()
        self._ended = True
        return ManifestParts(self._total, self._chunk_bytes, len(digests), root_of(digests))

    def abort(self) -> None:
        """Stop sending; what was stored stays until it is purged or expires. Idempotent."""
        self._ended = True
        for task in (*self._stores, *self._hashes):
            task.cancel()

    def _check(self) -> None:
        if self._failure is not None:
            self.abort()
            raise self._failure
        if self._ended:
            raise ResultError("The result was already finished or given up.")

    async def _send_chunk(self) -> None:
        pieces, self._pieces, self._filled = self._pieces, [], 0
        number = len(self._hashes)
        hashing = asyncio.ensure_future(_digest(pieces))
        self._hashes.append(hashing)

        async def store() -> None:
            await self._store(number, pieces, await hashing)

        await self._start(store())

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

    async def _store(self, name: int | str, pieces: Sequence[bytes | memoryview], digest: bytes) -> None:
        await store_chunk(self._bulk, subjects.result_chunk(self._job, self._attempt, name), pieces, digest)


async def store_chunk(
    bulk: Bulk, subject: str, pieces: Sequence[bytes | memoryview], digest: bytes, stream: str = subjects.RESULTS_STREAM
) -> None:
    """Store one write-once chunk; it being there already, with the same bytes, is success.

    Raises StoreFullError, NoReplyError, NotConnectedError, and ChunkError when other bytes are there.
    """
    if await bulk.store(subject, pieces, message_id=f"{subject}:{digest.hex()}", timeout_ms=_REPEAT_MS):
        return
    there = await bulk.get(stream, subject)
    if there is None or hashlib.sha256(there.data).digest() != digest:
        raise ChunkError(f"{subject} already holds other bytes; chunks are never overwritten.")


async def restore_result(
    bulk: Bulk, job: JobId, attempt: AttemptNumber, parts: ManifestParts, archive: Path
) -> list[int | str]:
    """Store again, from the site's own copy, the chunks that a wiped broker has lost; returns their names.

    Raises ChunkError when `archive` is not the file that `parts` describes, and as `ResultWriter.feed`.
    """
    there = await bulk.names(subjects.RESULTS_STREAM, subjects.result_chunks(job, attempt))
    digests: list[bytes] = []
    restored: list[int | str] = []
    with archive.open("rb") as file:
        while data := await asyncio.to_thread(file.read, parts.chunk_bytes):
            digests.append(await _digest([memoryview(data)]))
    if root_of(digests) != parts.root:
        raise ChunkError(f"{archive} is not the result that its manifest describes; nothing was sent.")
    with archive.open("rb") as file:
        for number, digest in enumerate(digests):
            data = await asyncio.to_thread(file.read, parts.chunk_bytes)
            subject = subjects.result_chunk(job, attempt, number)
            if subject not in there:
                await store_chunk(bulk, subject, [data], digest)
                restored.append(number)
    for name, part in index_parts(digests, parts.chunk_bytes) if len(digests) > 1 else ():
        subject = subjects.result_chunk(job, attempt, name)
        if subject not in there:
            await store_chunk(bulk, subject, [part], hashlib.sha256(part).digest())
            restored.append(name)
    return restored


def index_parts(digests: Sequence[bytes], chunk_bytes: int) -> list[tuple[str, bytes]]:
    """Return the index's chunks: (name, concatenated raw digests), `index` first, then `index-1`, ..."""
    each = max(1, chunk_bytes // 32)
    return [
        ("index" if start == 0 else f"index-{start // each}", b"".join(digests[start : start + each]))
        for start in range(0, len(digests), each)
    ]


async def _digest(pieces: Sequence[memoryview]) -> bytes:
    """Hash beside the event loop, unless that costs more than it saves."""
    if sum(len(piece) for piece in pieces) <= _INLINE_HASH_BYTES:
        return _sha256(pieces)
    return await asyncio.to_thread(_sha256, pieces)


def _sha256(pieces: Sequence[memoryview]) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()
