"""The archive: saved values as a typed tree and raw bytes; the only form in which a result leaves a sandbox.

Layout (docs/archive-format.md): magic, u32 length of the tree, the tree (strict JSON), then the storages, each aligned to
64 bytes. The header comes first, so a reader knows the total size and allocates once. There is never a pickle in it, and
reading it imports nothing that the archive names: every type it can rebuild stands in `archive_types.py`.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edif_mesh.errors import ArchiveError
from edif_mesh.results.archive_decode import Decoder
from edif_mesh.results.archive_encode import Encoder

MAGIC = b"EDIFAR\x00\x01"
ALIGNMENT = 64
MAX_TREE_BYTES = 64 << 20
MAX_TOTAL_BYTES = 1 << 44
_HEAD = struct.Struct("<8sI")


@dataclass(frozen=True)
class ArchivePlan:
    """A result that is ready to be sent: its exact size, and its bytes as views over the tensors' own memory."""

    header: bytes
    storages: tuple[tuple[int, memoryview], ...]
    """Offset from the start of the archive, and the bytes."""
    total_bytes: int

    def buffers(self) -> Iterator[memoryview]:
        """Yield the archive in order; the lengths sum to `total_bytes`."""
        yield memoryview(self.header)
        position = len(self.header)
        for offset, data in self.storages:
            if offset > position:
                yield memoryview(bytes(offset - position))
            yield data
            position = offset + len(data)

    def to_bytes(self) -> bytes:
        """Return the whole archive (tests and small results)."""
        return b"".join(self.buffers())


def plan(values: Mapping[str, Any]) -> ArchivePlan:
    """Lay out `values` as an archive without copying tensors that are dense CPU memory already.

    Raises UnsupportedValueError, naming the value, before any byte is produced.
    """
    encoder = Encoder()
    tree = {"values": encoder.mapping(values), "storages": [len(data) for data in encoder.storages]}
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_TREE_BYTES:
        raise ArchiveError(
            f"The saved values have a structure of {len(text) >> 20} MiB; {MAX_TREE_BYTES >> 20} MiB are allowed. "
            "Save tensors instead of long Python lists."
        )
    header = _HEAD.pack(MAGIC, len(text)) + text
    offsets, end = storage_offsets(len(header), [len(data) for data in encoder.storages])
    return ArchivePlan(header, tuple(zip(offsets, encoder.storages, strict=True)), end)


def storage_offsets(header_bytes: int, sizes: list[int]) -> tuple[list[int], int]:
    """Return where each storage begins, and where the archive ends."""
    offsets, position = [], header_bytes
    for size in sizes:
        position = -(-position // ALIGNMENT) * ALIGNMENT
        offsets.append(position)
        position += size
    return offsets, position


def read(
    source: bytes | bytearray | memoryview | mmap.mmap | Path | str, classes: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Return the saved values in `source` by name.

    A writable buffer is used in place: the tensors alias it. Read-only bytes and files are copied (a file by a private
    memory map). `classes` maps `module.Name` to a class of the caller's own that may be rebuilt; any other unknown class
    becomes a `Record`.

    Raises ArchiveError for anything that is not exactly an archive; nothing is allocated from a number that was not
    checked against the bytes that are there.
    """
    view = _writable(source)
    tree, header_bytes = parse_header(view)
    sizes = tree["storages"]
    offsets, end = storage_offsets(header_bytes, sizes)
    if end != len(view):
        raise ArchiveError(f"The archive has {len(view)} bytes, its header says {end}.")
    storages = [
        torch.frombuffer(view, dtype=torch.uint8, count=size, offset=offset)
        if size
        else torch.empty(0, dtype=torch.uint8)
        for offset, size in zip(offsets, sizes, strict=True)
    ]
    return Decoder(storages, dict(classes or {})).mapping(tree["values"])


def _writable(source: bytes | bytearray | memoryview | mmap.mmap | Path | str) -> memoryview:
    """Return writable memory with the source's bytes, aligned well enough for every dtype."""
    if isinstance(source, Path | str):
        with Path(source).open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ArchiveError("The archive is empty.")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    view = memoryview(source).cast("B")
    if view.readonly or not len(view) or torch.frombuffer(view, dtype=torch.uint8).data_ptr() % 16:
        copy = allocate(len(view))
        copy[:] = view
        return copy
    return view


def allocate(size: int) -> memoryview:
    """Return `size` writable bytes, aligned and not yet touched: the kernel gives pages as they are filled."""
    return memoryview(torch.empty(size, dtype=torch.uint8).numpy()) if size else memoryview(bytearray())


class StreamingReader:
    """Takes an archive as its pieces arrive, in order, and copies each once to its final place.

    `total_bytes` is None until the header is there. Nothing larger than `limit_bytes` is ever allocated.
    """

    def __init__(self, limit_bytes: int, classes: Mapping[str, type] | None = None) -> None:
        self.total_bytes: int | None = None
        self.received_bytes = 0
        self._limit, self._classes = limit_bytes, classes
        self._head = bytearray()
        self._memory = memoryview(bytearray())

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes; raises ArchiveError for a bad header, too many bytes or too large a claim."""
        if self.total_bytes is None:
            self._head += data
            data = self._open_header()
        end = self.received_bytes + len(data)
        if self.total_bytes is None or not len(data):
            return
        if end > self.total_bytes:
            raise ArchiveError("More bytes came than the archive's header says.")
        self._memory[self.received_bytes : end] = data
        self.received_bytes = end

    def finish(self) -> dict[str, Any]:
        """Return the values, which alias the reader's memory; raises ArchiveError when bytes are missing."""
        if self.received_bytes != self.total_bytes:
            raise ArchiveError(f"The archive ended after {self.received_bytes + len(self._head)} bytes.")
        return read(self._memory, self._classes)

    def _open_header(self) -> bytes | bytearray:
        """Allocate when the header is complete; return what was held back until then, else nothing."""
        if len(self._head) >= _HEAD.size:
            magic, length = _HEAD.unpack_from(self._head)
            if magic != MAGIC or length > min(MAX_TREE_BYTES, self._limit):
                raise ArchiveError("This is no archive of this version, or its header is too large.")
            if len(self._head) >= _HEAD.size + length:
                tree, header_bytes = parse_header(memoryview(bytes(self._head)))
                _, total = storage_offsets(header_bytes, tree["storages"])
                if total > self._limit:
                    raise ArchiveError(f"The archive claims {total} bytes; at most {self._limit} are allowed here.")
                self.total_bytes, self._memory = total, allocate(total)
                held, self._head = self._head, bytearray()
                return held
        return b""


def parse_header(view: memoryview) -> tuple[dict[str, Any], int]:
    """Return the checked tree and the header's length; raises ArchiveError."""
    if len(view) < _HEAD.size:
        raise ArchiveError("The archive is shorter than its own head.")
    magic, length = _HEAD.unpack(view[: _HEAD.size])
    if magic != MAGIC:
        raise ArchiveError("This is no archive of this version.")
    if length > MAX_TREE_BYTES or _HEAD.size + length > len(view):
        raise ArchiveError(f"The archive's header claims {length} bytes, which are not there.")
    try:
        tree = json.loads(
            bytes(view[_HEAD.size : _HEAD.size + length]), object_pairs_hook=_unique, parse_constant=_constant
        )
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"The archive's header is not our JSON: {error}") from error
    if not isinstance(tree, dict) or set(tree) != {"values", "storages"} or not isinstance(tree["values"], list):
        raise ArchiveError("The archive's header lacks its values or storages.")
    sizes = tree["storages"]
    if not isinstance(sizes, list) or not all(type(size) is int and 0 <= size <= MAX_TOTAL_BYTES for size in sizes):
        raise ArchiveError("The archive's storages have no sane sizes.")
    if sum(sizes) > MAX_TOTAL_BYTES:
        raise ArchiveError("The archive's storages are larger than any result may be.")
    return tree, _HEAD.size + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
