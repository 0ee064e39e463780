"""A zstd frame of stored blocks (RFC 8878, 3.1.1): what the unmodified client must decompress, at the speed of a copy.

The gateway stands beside its researcher. Activations hardly shrink, and compressing them would cost more time than the
loopback takes to carry them.
"""

from __future__ import annotations

from types import TracebackType
from typing import BinaryIO

BLOCK_BYTES = 128 << 10
_MAGIC = b"\x28\xb5\x2f\xfd"
_DESCRIPTOR = b"\xc0"  # eight bytes of content size follow the window
_WINDOW = b"\x38"  # 128 KiB: the largest block may be as long


class StoredFrame:
    """A writable file that becomes exactly one zstd frame in `out` (seekable), which declares its content size."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._begin = out, out.tell()
        self._block = bytearray(BLOCK_BYTES)
        self._filled = 0
        self._total = 0
        out.write(_MAGIC + _DESCRIPTOR + _WINDOW + bytes(8))

    def __enter__(self) -> StoredFrame:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Append `data`; whole blocks of it go out without a copy here."""
        view = memoryview(data).cast("B")
        size = len(view)
        self._total += size
        if self._filled:
            part = view[: BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled, view = self._filled + len(part), view[len(part) :]
        # The last block is always held back: only the end tells which one it is.
        if self._filled == BLOCK_BYTES and len(view):
            self._put(self._block, last=False)
            self._filled = 0
        while len(view) > BLOCK_BYTES:
            self._put(view[:BLOCK_BYTES], last=False)
            view = view[BLOCK_BYTES:]
        if len(view):
            self._block[: len(view)] = view
            self._filled = len(view)
        return size

    def flush(self) -> None:
        """Nothing to do: the last block must wait."""

    def finish(self) -> None:
        """Write the last block and the content size."""
        self._put(memoryview(self._block)[: self._filled], last=True)
        end = self._out.tell()
        self._out.seek(self._begin + len(_MAGIC + _DESCRIPTOR + _WINDOW))
        self._out.write(self._total.to_bytes(8, "little"))
        self._out.seek(end)

    def _put(self, block: bytearray | memoryview, *, last: bool) -> None:
        self._out.write((len(block) << 3 | last).to_bytes(3, "little"))
        self._out.write(block)
