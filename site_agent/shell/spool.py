"""A queue of result chunks that never makes the runner wait: in memory, beyond that in a file without a name."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from edif_mesh.errors import StoreFullError

MEMORY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Cut:
    """A chunk ends here; numbers of `element` bytes follow (0: unknown)."""

    element: int = 0


@dataclass(frozen=True, slots=True)
class _OnDisk:
    offset: int
    size: int


class Spool:
    """First in, first out; one writer, one reader. While the broker is away, results wait here."""

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder, self._room = folder, memory_bytes
        self._items: deque[bytes | bytearray | memoryview | _OnDisk | Cut] = deque()
        self._file = -1
        self._written = 0
        self._more = asyncio.Event()
        self._ended = self._closed = False
        self._busy = threading.Lock()
        """Held by the thread that uses the file: a closed descriptor's number may soon be another file's."""

    async def put(self, chunk: bytes | bytearray | memoryview) -> None:
        """Add a chunk. Raises StoreFullError when neither memory nor the disk has room."""
        if len(chunk) > self._room:
            await asyncio.to_thread(self._write, chunk)
        else:
            self._room -= len(chunk)
            self._items.append(chunk)
        self._more.set()

    def cut(self, element: int) -> None:
        """Say that a chunk ends here."""
        self._items.append(Cut(element))
        self._more.set()

    def end(self) -> None:
        """No chunk follows."""
        self._ended = True
        self._more.set()

    async def get(self) -> bytes | bytearray | memoryview | Cut | None:
        """Return the next chunk or cut, or None after the last."""
        while True:
            if self._items:
                item = self._items.popleft()
                if isinstance(item, _OnDisk):
                    return await asyncio.to_thread(self._read, item.size, item.offset)
                if not isinstance(item, Cut):
                    self._room += len(item)
                return item
            if self._ended:
                return None
            self._more.clear()
            await self._more.wait()

    def close(self) -> None:
        """Give memory and disk back; idempotent. A thread that still writes gives the disk back when it is done."""
        self._closed = True
        self._items.clear()
        if self._busy.acquire(blocking=False):
            self._release()

    def _release(self) -> None:
        file = self._file
        if self._closed:
            self._file = -1
        self._busy.release()
        if self._closed and file >= 0:
            os.close(file)

    def _read(self, size: int, offset: int) -> bytes:
        self._busy.acquire()
        try:
            return b"" if self._closed else os.pread(self._file, size, offset)
        finally:
            self._release()

    def _write(self, chunk: bytes | bytearray | memoryview) -> None:
        self._busy.acquire()
        try:
            if not self._closed:
                self._append(chunk)
        except OSError as error:
            raise StoreFullError(f"The result cannot be kept in {self._folder}: {error.strerror}.") from error
        finally:
            self._release()

    def _append(self, chunk: bytes | bytearray | memoryview) -> None:
        if self._file < 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file, name = tempfile.mkstemp(dir=self._folder, prefix="result-")
            os.unlink(name)
        view, offset = memoryview(chunk), self._written
        while view:
            count = os.pwrite(self._file, view, offset)
            view, offset = view[count:], offset + count
        self._items.append(_OnDisk(self._written, len(chunk)))
        self._written += len(chunk)
