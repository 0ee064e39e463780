"""What of an archive has left already, while its values may still change."""

from __future__ import annotations

import hashlib

import numpy as np

from edif_mesh.results.archive_records import HEAD, HEAD_BYTES, RECORD_BYTES, padding, record_head

_ROW = 512

Parts = list[bytes | memoryview]


class Sent:
    """The archive's position, and the storages that have left, by the place of their bytes in memory.

    A place in memory may have changed, or be another value's by now: it counts only while its bytes are what was sent.
    """

    def __init__(self) -> None:
        self.position = 0
        self._places: dict[tuple[int, int], tuple[int, bytes]] = {}

    def begin(self) -> Parts:
        """Return the archive's head unless it has left."""
        if self.position:
            return []
        self.position = HEAD_BYTES
        return [HEAD]

    def record(self, kind: bytes, data: Parts) -> tuple[int, Parts]:
        """Return the offset of the data of a new record, and the record."""
        size = sum(map(len, data))
        offset = self.position + RECORD_BYTES
        self.position = offset + size + padding(size)
        return offset, [record_head(kind, size), *data, bytes(padding(size))]

    def add(self, data: memoryview, offset: int, mark: bytes) -> None:
        """Note that the bytes at `data`, whose `fingerprint` was `mark` before they left, stand at `offset`."""
        self._places[address(data)] = offset, mark

    def offset_of(self, data: memoryview) -> int | None:
        """Return where these bytes stand as they are now, or None."""
        found = self._places.get(address(data)) if self._places and len(data) else None
        return found[0] if found is not None and fingerprint(data) == found[1] else None


def address(data: memoryview) -> tuple[int, int]:
    """Return where in memory bytes lie, and how many."""
    return np.frombuffer(data, np.uint8).ctypes.data, len(data)


def fingerprint(data: memoryview) -> bytes:
    """Return 32 bytes that differ for bytes that were changed by mistake: sums over rows and over columns, at memory's speed.

    Not for bytes that somebody wants to forge: who could, is the job itself, whose own result it would be.
    """
    flat = np.frombuffer(data, np.uint8)
    whole = len(flat) // (8 * _ROW) * 8 * _ROW
    table = flat[:whole].view(np.uint64).reshape(-1, _ROW) if flat.ctypes.data % 8 == 0 else None
    if table is None:
        return hashlib.sha256(data).digest()
    sums = hashlib.sha256(table.sum(axis=0, dtype=np.uint64))
    sums.update(table.sum(axis=1, dtype=np.uint64))
    sums.update(flat[whole:])
    return sums.digest()
