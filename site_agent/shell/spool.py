"""A queue of result chunks that never makes the runner wait: in memory, beyond that in a file without a name."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import deque
from pathlib import Path

from edif_mesh.errors import StoreFullError

MEMORY_BYTES = 256 << 20


class Spool:
    """First in, first out; one writer, one reader. While the broker is away, results wait here."""

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder, self._room = folder, memory_bytes
        self._memory: deque[bytes | bytearray] = deque()
        self._on_disk: deque[tuple[int, int]] = deque()
        self._file = -1
        self._written = 0
        self._more = asyncio.Event()
        self._ended = False

    async def put(self, chunk: bytes | bytearray) -> None:
        """Add a chunk. Raises StoreFullError when neither memory nor the disk has room."""
        if self._on_disk or len(chunk) > self._room:
            await asyncio.to_thread(self._write, chunk)
        else:
            self._room -= len(chunk)
            self._memory.append(chunk)
        self._more.set()

    def end(self) -> None:
        """No chunk follows."""
        self._ended = True
        self._more.set()

    async def get(self) -> bytes | bytearray | None:
        """Return the next chunk, or None after the last."""
        while True:
            if self._memory:
                chunk = self._memory.popleft()
                self._room += len(chunk)
                return chunk
            if self._on_disk:
                offset, size = self._on_disk.popleft()
                return await asyncio.to_thread(os.pread, self._file, size, offset)
            if self._ended:
                return None
            self._more.clear()
            await self._more.wait()

    def close(self) -> None:
        """Give memory and disk back; idempotent."""
        self._memory.clear()
        self._on_disk.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, chunk: bytes | bytearray) -> None:
        try:
            if self._file < 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file, name = tempfile.mkstemp(dir=self._folder, prefix="result-")
                os.unlink(name)
            view, offset = memoryview(chunk), self._written
            while view:
                count = os.pwrite(self._file, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise StoreFullError(f"The result cannot be kept in {self._folder}: {error.strerror}.") from error
        self._on_disk.append((self._written, len(chunk)))
        self._written += len(chunk)
