"""Fetch a result: manifest verified first, chunks by direct reads with a wide window, each checked, resumable."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

from edif_mesh.domain.ids import Digest
from edif_mesh.errors import ChunkError, ManifestError
from edif_mesh.transport.ports import Streams
from edif_mesh.wire.messages import Manifest
from edif_mesh.wire.subjects import RESULTS_STREAM, result_chunk

DIGEST_BYTES = 32
WINDOW = 8
MAX_CHUNK_BYTES = 1 << 20
MAX_ARCHIVE_BYTES = 1 << 42


def check_manifest(manifest: Manifest, *, job: str, order_digest: Digest, signer: str) -> None:
    """Raise ManifestError unless the manifest is for this order, by the site that signed it, with sane numbers."""
    if manifest.job != job or (order_digest and manifest.order_digest != order_digest):
        raise ManifestError("The manifest belongs to another job; the result was not taken.")
    if manifest.site != signer:
        raise ManifestError(
            f"The manifest names the site {manifest.site} but {signer} signed it; the result was not taken."
        )
    chunks = -(-manifest.archive_bytes // manifest.chunk_bytes) if manifest.chunk_bytes > 0 else -1
    if (
        not 0 < manifest.archive_bytes <= MAX_ARCHIVE_BYTES
        or manifest.chunk_bytes > MAX_CHUNK_BYTES
        or chunks != manifest.chunks
    ):
        raise ManifestError("The manifest's sizes do not fit each other; the result was not taken.")


class ResultFetch:
    """One result on its way; keeps what has arrived, so `run` may be called again after a failure."""

    def __init__(self, streams: Streams, manifest: Manifest) -> None:
        self._streams, self._manifest = streams, manifest
        self.data = bytearray(manifest.archive_bytes)
        self._index = b""
        self._have: set[int] = set()

    @property
    def fetched_bytes(self) -> int:
        """How much has arrived and was verified."""
        return min(len(self._have) * self._manifest.chunk_bytes, self._manifest.archive_bytes)

    async def run(self, progress: Callable[[int, int], None] | None = None) -> bytearray:
        """Return the verified archive. Raises ChunkError that names what is missing or altered, TransportError."""
        if not self._index:
            self._index = await self._fetch_index()
        missing = iter([n for n in range(self._manifest.chunks) if n not in self._have])

        async def worker() -> None:
            for number in missing:
                await self._fetch_chunk(number)
                if progress is not None:
                    progress(self.fetched_bytes, self._manifest.archive_bytes)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(WINDOW, self._manifest.chunks)):
                group.create_task(worker())
        return self.data

    async def _fetch_index(self) -> bytes:
        manifest = self._manifest
        if manifest.chunks == 1:
            data = await self._get(0)
            if hashlib.sha256(hashlib.sha256(data).digest()).hexdigest() != manifest.root:
                raise ChunkError(f"The only chunk of {manifest.job} was altered; nothing of it was kept.")
            self._place(0, data)
            return hashlib.sha256(data).digest()
        index, part = b"", 0
        while len(index) < manifest.chunks * DIGEST_BYTES:
            piece = await self._get("index" if part == 0 else f"index-{part}")
            if not piece:
                raise ChunkError(f"The index of {manifest.job}'s result is empty.")
            index, part = index + piece, part + 1
        if len(index) != manifest.chunks * DIGEST_BYTES or hashlib.sha256(index).hexdigest() != manifest.root:
            raise ChunkError(f"The index of {manifest.job}'s result does not fit its signed manifest.")
        return index

    async def _fetch_chunk(self, number: int) -> None:
        data = await self._get(number)
        if hashlib.sha256(data).digest() != self._index[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]:
            raise ChunkError(f"Chunk {number} of {self._manifest.job}'s result was altered; it was not kept.")
        self._place(number, data)

    def _place(self, number: int, data: bytes) -> None:
        manifest = self._manifest
        start = number * manifest.chunk_bytes
        end = min(start + manifest.chunk_bytes, manifest.archive_bytes)
        if len(data) != end - start:
            raise ChunkError(
                f"Chunk {number} of {manifest.job}'s result has {len(data)} bytes instead of {end - start}."
            )
        self.data[start:end] = data
        self._have.add(number)

    async def _get(self, name: int | str) -> bytes:
        manifest = self._manifest
        stored = await self._streams.get(RESULTS_STREAM, result_chunk(manifest.job, manifest.attempt, name))
        if stored is None:
            what = f"Chunk {name}" if isinstance(name, int) else "The index"
            raise ChunkError(f"{what} of {manifest.job}'s result is not in the store (any more).")
        return stored.data
