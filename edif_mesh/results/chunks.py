"""What a chunk must be before a byte of it counts."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Protocol

from edif_mesh.errors import ChunkError
from edif_mesh.results.index import Entry
from edif_mesh.wire.messages import Manifest, ResultPart

AS_IS = 0
"""The form of a chunk that travels as it is."""


class Opener(Protocol):
    """Turns a chunk as it travels, whose SHA-256 was checked, into its piece of the archive."""

    def open(self, of: Manifest | ResultPart, number: int, entry: Entry, stored: memoryview) -> memoryview:
        """Return exactly `entry.plain_bytes` bytes; raises ChunkError that names the chunk. Called in threads."""


def checked(opener: Opener, of: Manifest | ResultPart, number: int, entry: Entry, stored: memoryview) -> memoryview:
    """Return a chunk's piece of the archive; raises ChunkError, naming it, when it is not what the index says."""
    if len(stored) != entry.stored_bytes:
        raise ChunkError(
            f"Chunk {number} has {len(stored)} bytes instead of {entry.stored_bytes}; it was not accepted."
        )
    if hashlib.sha256(stored).digest() != entry.digest:
        raise ChunkError(f"Chunk {number} is altered; nothing of it was accepted.")
    plain = opener.open(of, number, entry, stored)
    if len(plain) != entry.plain_bytes:
        raise ChunkError(
            f"Chunk {number} opens to {len(plain)} bytes instead of {entry.plain_bytes}; it was not accepted."
        )
    return plain


class ChunkCache:
    """The newest chunks that were checked here, by SHA-256: what a later result uses again need not come again."""

    def __init__(self, most_bytes: int = 64 << 20) -> None:
        self._left = most_bytes
        self._chunks: OrderedDict[bytes, memoryview] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> memoryview | None:
        """Return the chunk as it travels, or None."""
        with self._lock:
            return self._chunks.get(digest)

    def add(self, digest: bytes, stored: memoryview) -> None:
        """Keep a chunk, whose SHA-256 was checked; the oldest make room."""
        with self._lock:
            if digest not in self._chunks:
                self._chunks[digest] = memoryview(bytes(stored))  # the view's buffer is larger, and used again
                self._left -= len(stored)
            while self._left < 0:
                self._left += len(self._chunks.popitem(last=False)[1])
