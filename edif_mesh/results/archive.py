"""The archive: saved values as a typed tree and raw bytes; the only form in which a result leaves a sandbox.

There is never a pickle in it, and reading it imports nothing that the archive names: every type it can rebuild stands in
`archive_types.py`. The outer form is that of `archive_records.py`; files of version 1 are still read.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edif_mesh.errors import ArchiveError
from edif_mesh.results.archive_decode import Decoder
from edif_mesh.results.archive_encode import Encoder
from edif_mesh.results.archive_records import (
    DATA,
    HEAD,
    HEAD_BYTES,
    MAX_TOTAL_BYTES,
    MAX_TREE_BYTES,
    RECORD_BYTES,
    TAIL_BYTES,
    TREE,
    Leaf,
    load_json,
    padding,
    parse_tail,
    parse_tree,
    tail,
    tree_text,
)
from edif_mesh.results.archive_sent import Sent

ALONE_BYTES = 256 << 10
"""A storage of so many bytes has a record, and chunks, of its own: the same tensor then gives the same chunks in every job."""
_MAGIC_1 = b"EDIFAR\x00\x01"
_HEAD_1 = struct.Struct("<8sI")


@dataclass(frozen=True, slots=True)
class Cut:
    """Between buffers: a chunk should end here; numbers of `element` bytes follow."""

    element: int = 0


@dataclass(frozen=True)
class ArchivePlan:
    """A result that is ready to be sent: its exact size, and its bytes as views over the tensors' own memory."""

    parts: tuple[bytes | memoryview | Cut, ...]
    total_bytes: int
    """Of the whole archive, what was sent before included."""

    def buffers(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes in order, without the cuts."""
        return (part for part in self.parts if not isinstance(part, Cut))

    def to_bytes(self) -> bytes:
        """Return the whole archive (tests and small results)."""
        return b"".join(self.buffers())


def plan(values: Mapping[str, Any], *, wire_dtype: str = "") -> ArchivePlan:
    """Lay out `values` as an archive without copying tensors that are dense CPU memory already.

    `wire_dtype` as in `ResultOptions`. Raises UnsupportedValueError, naming the value, before any byte is produced.
    """
    return plan_rest(values, Sent(), wire_dtype=wire_dtype)


def plan_rest(values: Mapping[str, Any], sent: Sent, *, wire_dtype: str = "") -> ArchivePlan:
    """As `plan`, for an archive of which a part has left: what is there is only named. `sent` then counts all of it."""
    encoder = Encoder(wire_dtype)
    nodes = encoder.mapping(values)
    parts: list[bytes | memoryview | Cut] = [*sent.begin()]
    places: list[tuple[int, int]] = []
    together: list[tuple[int, memoryview]] = []
    for number, data in enumerate(encoder.storages):
        places.append((sent.offset_of(data) or 0, len(data)))
        if not places[-1][0]:
            if len(data) >= ALONE_BYTES:
                offset, record = sent.record(DATA, [data])
                parts += [Cut(encoder.elements[number]), *record, Cut()]
                places[-1] = (offset, len(data))
            else:
                together.append((number, data))
    if together:
        offset, record = sent.record(
            DATA, list(itertools.chain.from_iterable((d, bytes(padding(len(d)))) for _, d in together))
        )
        for number, data in together:
            places[number] = (offset, len(data))
            offset += len(data) + padding(len(data))
        parts += record
    text = tree_text(nodes, places)
    offset, record = sent.record(TREE, [text])
    sent.position += TAIL_BYTES
    parts += [*record, tail(offset, len(text), sent.position)]
    return ArchivePlan(tuple(part for part in parts if isinstance(part, Cut) or len(part)), sent.position)


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
    values, places = _read_version_1(view) if view[: len(_MAGIC_1)] == _MAGIC_1 else _read_tree(view)
    return Decoder(_tensors(view, places), dict(classes or {})).mapping(values)


def leaf_value(leaf: Leaf, storages: Iterable[bytes], classes: Mapping[str, type] | None = None) -> Any:
    """Return the value of a LEAF record, over the bytes of its storages; raises ArchiveError."""
    tensors = [
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        for data in storages
    ]
    return Decoder(tensors, dict(classes or {})).mapping([[leaf.name, leaf.node]])[leaf.name]


def _tensors(view: memoryview, places: list[tuple[int, int]]) -> list[torch.Tensor]:
    return [
        torch.frombuffer(view, dtype=torch.uint8, count=size, offset=offset)
        if size
        else torch.empty(0, dtype=torch.uint8)
        for offset, size in places
    ]


def _read_tree(view: memoryview) -> tuple[list[Any], list[tuple[int, int]]]:
    if view[:HEAD_BYTES] != HEAD:
        raise ArchiveError("This is no archive of this version.")
    offset, size = parse_tail(view[-TAIL_BYTES:], len(view))
    tree = parse_tree(view[offset : offset + size], offset - RECORD_BYTES)
    return tree.values, tree.storages


def _read_version_1(view: memoryview) -> tuple[list[Any], list[tuple[int, int]]]:
    """Version 1: magic, u32 length of the tree, the tree, the storages at multiples of 64."""
    if len(view) < _HEAD_1.size:
        raise ArchiveError("The archive is shorter than its own head.")
    _, length = _HEAD_1.unpack(view[: _HEAD_1.size])
    if length > MAX_TREE_BYTES or _HEAD_1.size + length > len(view):
        raise ArchiveError(f"The archive's header claims {length} bytes, which are not there.")
    tree = load_json(view[_HEAD_1.size : _HEAD_1.size + length], "header")
    if set(tree) != {"values", "storages"} or not isinstance(tree["values"], list):
        raise ArchiveError("The archive's header lacks its values or storages.")
    sizes = tree["storages"]
    if not isinstance(sizes, list) or not all(type(size) is int and 0 <= size <= MAX_TOTAL_BYTES for size in sizes):
        raise ArchiveError("The archive's storages have no sane sizes.")
    if sum(sizes) > MAX_TOTAL_BYTES:
        raise ArchiveError("The archive's storages are larger than any result may be.")
    places, position = [], _HEAD_1.size + length
    for size in sizes:
        position += padding(position)
        places.append((position, size))
        position += size
    if position != len(view):
        raise ArchiveError(f"The archive has {len(view)} bytes, its header says {position}.")
    return tree["values"], places


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
