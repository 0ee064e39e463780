"""Where a result goes as it arrives: into memory, or into a file that a later process can go on with."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from edif_mesh.errors import StoreFullError
from edif_mesh.results.manifest import chunk_size
from edif_mesh.wire.messages import Manifest

_MAP_FROM_BYTES = 4 << 20


class Sink(Protocol):
    """Takes chunks in any order; called from one thread at a time."""

    in_memory: bool
    """Whether no call waits for a disk."""

    def begin(self, manifest: Manifest) -> dict[int, bytes]:
        """Make room, and return the SHA-256 of every chunk that is already there, by number."""

    def place(self, number: int, data: memoryview, digest: bytes) -> None:
        """Put one chunk where it belongs."""

    def forget(self) -> None:
        """Distrust everything that is there."""

    def finish(self) -> None:
        """All is there and verified."""

    def close(self) -> None:
        """Stop, keeping what is there; idempotent."""


class BufferSink:
    """One preallocated buffer; `data` is the archive once the read has returned."""

    in_memory = True

    def __init__(self) -> None:
        self.data = memoryview(b"")
        self._chunk_bytes = 0

    def begin(self, manifest: Manifest) -> dict[int, bytes]:
        """Allocate the whole archive."""
        self.data, self._chunk_bytes = _zeroed(manifest.archive_bytes), manifest.chunk_bytes
        return {}

    def place(self, number: int, data: memoryview, digest: bytes) -> None:
        """Copy one chunk to its place."""
        start = number * self._chunk_bytes
        self.data[start : start + len(data)] = data

    def forget(self) -> None:
        """Nothing to do: a failed read's buffer is not used."""

    def finish(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def _zeroed(size: int) -> memoryview:
    """Return a writable buffer; a large one is mapped, so that its pages are touched once, when they are filled."""
    if size < _MAP_FROM_BYTES:
        return memoryview(bytearray(size))
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)


class FileSink:
    """A file that appears under its name only when complete; until then `NAME.part`, and `NAME.part.have` beside it.

    The second holds a line for each chunk that is there. It is only believed after the bytes were hashed again.
    """

    in_memory = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        self._have = path.with_name(path.name + ".part.have")
        self._file: IO[bytes] | None = None
        self._list: IO[str] | None = None
        self._chunk_bytes = 0

    def begin(self, manifest: Manifest) -> dict[int, bytes]:
        """Open the partial file and return what of it is this very result; raises StoreFullError."""
        head = {"root": manifest.root, "archive_bytes": manifest.archive_bytes, "chunk_bytes": manifest.chunk_bytes}
        self._chunk_bytes = manifest.chunk_bytes
        there = self._look(head, manifest)
        try:
            self._file = self._part.open("r+b" if there else "wb", buffering=0)
            self._list = self._have.open("w")
        except OSError as error:
            raise StoreFullError(f"{self._part} cannot be written: {error.strerror}.") from error
        self._list.write(json.dumps(head) + "\n")
        for number, digest in there.items():
            self._list.write(f"{number} {digest.hex()}\n")
        self._list.flush()
        return there

    def place(self, number: int, data: memoryview, digest: bytes) -> None:
        """Write one chunk and then note that it is there; raises StoreFullError when the disk is full."""
        assert self._file is not None
        assert self._list is not None
        try:
            start = number * self._chunk_bytes
            while len(data):
                written = os.pwrite(self._file.fileno(), data, start)
                start, data = start + written, data[written:]
            self._list.write(f"{number} {digest.hex()}\n")
        except OSError as error:
            raise StoreFullError(f"{self._part} cannot be written: {error.strerror}.") from error

    def forget(self) -> None:
        """Begin with nothing next time."""
        self.close()
        self._have.unlink(missing_ok=True)

    def finish(self) -> None:
        """Make it durable and give it its name; raises StoreFullError."""
        assert self._file is not None
        try:
            os.fsync(self._file.fileno())
            self.close()
            self._part.replace(self.path)
        except OSError as error:
            raise StoreFullError(f"{self.path} cannot be written: {error.strerror}.") from error
        self._have.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop, keeping what is there; idempotent."""
        for file in (self._file, self._list):
            if file is not None:
                file.close()
        self._file = self._list = None

    def _look(self, head: dict[str, object], manifest: Manifest) -> dict[int, bytes]:
        try:
            first, *lines = self._have.read_text().splitlines()
            if json.loads(first) != head:
                return {}
            claimed = {int(number): bytes.fromhex(digest) for number, digest in (line.split() for line in lines)}
            file = self._part.open("rb")
        except (OSError, ValueError):
            return {}
        there: dict[int, bytes] = {}
        with file:
            for number, digest in claimed.items():
                if not 0 <= number < manifest.chunks:
                    continue
                file.seek(number * manifest.chunk_bytes)
                data = file.read(chunk_size(manifest, number))
                if hashlib.sha256(data).digest() == digest:
                    there[number] = digest
        return there
