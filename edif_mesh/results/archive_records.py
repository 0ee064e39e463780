"""The archive's outer form, version 2: a stream of records that can be written while values are still being made.

64 bytes of head, records at multiples of 64, 64 bytes of tail that say where the tree is (ADR 5, docs/archive-format.md).
Every number that is read here is checked against the bytes that are there.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from edif_mesh.errors import ArchiveError

MAGIC = b"EDIFAR\x00\x02"
END = b"EDIFEND\x02"
ALIGNMENT = HEAD_BYTES = TAIL_BYTES = RECORD_BYTES = 64
MAX_TREE_BYTES = 64 << 20
MAX_LEAF_BYTES = 1 << 20
MAX_TOTAL_BYTES = 1 << 44
DATA, LEAF, TREE = b"DATA", b"LEAF", b"TREE"
HEAD = MAGIC + bytes(HEAD_BYTES - len(MAGIC))
_RECORD = struct.Struct("<4sIQ")
_TAIL = struct.Struct("<8sQQQ")


@dataclass(frozen=True, slots=True)
class Tree:
    """What is saved: `[[name, node], ...]`, and where each storage lies: (offset in the archive, bytes)."""

    values: list[Any]
    storages: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One saved value, whose storages stand before it; said while the job runs, and not the last word."""

    name: str
    node: Any
    storages: list[tuple[int, int]]


def padding(size: int) -> int:
    """Return how many zeros follow `size` bytes up to the next multiple of 64."""
    return -size % ALIGNMENT


def record_head(kind: bytes, size: int) -> bytes:
    """Return the 64 bytes that stand before `size` bytes of data."""
    return _RECORD.pack(kind, 0, size) + bytes(RECORD_BYTES - _RECORD.size)


def tail(tree_offset: int, tree_bytes: int, archive_bytes: int) -> bytes:
    """Return the archive's last 64 bytes."""
    return _TAIL.pack(END, tree_offset, tree_bytes, archive_bytes) + bytes(TAIL_BYTES - _TAIL.size)


def leaf_text(name: str, node: Any, storages: list[tuple[int, int]]) -> bytes:
    """Return the data of a LEAF record."""
    return json.dumps({"name": name, "node": node, "storages": storages}, separators=(",", ":")).encode()


def tree_text(values: list[Any], storages: list[tuple[int, int]]) -> bytes:
    """Return the data of the TREE record; raises ArchiveError when it is larger than any reader takes."""
    text = json.dumps({"values": values, "storages": storages}, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_TREE_BYTES:
        raise ArchiveError(
            f"The saved values have a structure of {len(text) >> 20} MiB; {MAX_TREE_BYTES >> 20} MiB are allowed. "
            "Save tensors instead of long Python lists."
        )
    return text


def parse_tail(data: bytes | memoryview, archive_bytes: int) -> tuple[int, int]:
    """Return offset and length of the tree's data, from the last 64 bytes; raises ArchiveError."""
    if len(data) != TAIL_BYTES or archive_bytes < HEAD_BYTES + RECORD_BYTES + TAIL_BYTES:
        raise ArchiveError("The archive is shorter than its own head and tail.")
    end, offset, size, total = _TAIL.unpack(data[: _TAIL.size])
    if end != END or any(data[_TAIL.size :]):
        raise ArchiveError("This is no archive of this version: it does not end like one.")
    if total != archive_bytes or total % ALIGNMENT or total > MAX_TOTAL_BYTES:
        raise ArchiveError(f"The archive has {archive_bytes} bytes, its end says {total}.")
    if not 0 < size <= MAX_TREE_BYTES or offset + size + padding(size) != total - TAIL_BYTES or offset % ALIGNMENT:
        raise ArchiveError("The archive's end says that its tree is where it cannot be.")
    return offset, size


def parse_tree(data: bytes | memoryview, end: int) -> Tree:
    """Return the checked tree of an archive whose storages lie before the offset `end`; raises ArchiveError."""
    tree = load_json(data, "tree")
    if set(tree) != {"values", "storages"} or not isinstance(tree["values"], list):
        raise ArchiveError("The archive's tree lacks its values or storages.")
    return Tree(tree["values"], _storages(tree["storages"], end))


def parse_leaf(data: bytes | memoryview, end: int) -> Leaf:
    """Return the checked value of a LEAF record at the offset `end`; raises ArchiveError."""
    leaf = load_json(data, "leaf")
    if set(leaf) != {"name", "node", "storages"} or not isinstance(leaf["name"], str):
        raise ArchiveError("A value of the archive lacks its name, node or storages.")
    return Leaf(leaf["name"], leaf["node"], _storages(leaf["storages"], end))


def _storages(value: Any, end: int) -> list[tuple[int, int]]:
    if not isinstance(value, list):
        raise ArchiveError("The archive's storages are no list.")
    found: list[tuple[int, int]] = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(n) is int for n in pair):
            raise ArchiveError("The archive's storages have no sane places.")
        offset, size = pair
        if offset % ALIGNMENT or offset < HEAD_BYTES + RECORD_BYTES or size < 0 or offset + size > end:
            raise ArchiveError("A storage of the archive lies where it cannot be.")
        found.append((offset, size))
    reached = 0
    for offset, size in sorted(found):
        if size and offset < reached:
            raise ArchiveError("Two storages of the archive lie over each other.")
        reached = max(reached, offset + size)
    return found


def load_json(data: bytes | memoryview, what: str) -> dict[str, Any]:
    """Return a JSON object in which no key stands twice; raises ArchiveError."""
    try:
        value = json.loads(bytes(data), object_pairs_hook=_unique, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"The archive's {what} is not our JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArchiveError(f"The archive's {what} is no object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


class RecordReader:
    """Reads along while an archive grows; `read(start, size)` gives bytes that are there already."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self._position = 0

    def leaves(self, available_bytes: int) -> Iterator[Leaf]:
        """Yield the values that are complete in the first `available_bytes` and were not yielded before.

        Raises ArchiveError for what is no stream of records.
        """
        if self._position == 0:
            if available_bytes < HEAD_BYTES:
                return
            if self._read(0, HEAD_BYTES) != HEAD:
                raise ArchiveError("This is no archive of this version.")
            self._position = HEAD_BYTES
        while self._position + RECORD_BYTES <= available_bytes:
            head = self._read(self._position, RECORD_BYTES)
            kind, zero, size = _RECORD.unpack(head[: _RECORD.size])
            data = self._position + RECORD_BYTES
            if kind not in (DATA, LEAF, TREE) or zero or any(head[_RECORD.size :]) or size > MAX_TOTAL_BYTES:
                raise ArchiveError("The archive has a record of no known kind.")
            if kind == TREE or data + size + padding(size) > available_bytes:
                return
            if kind == LEAF:
                if size > MAX_LEAF_BYTES:
                    raise ArchiveError("A value of the archive has too large a structure to be read along.")
                yield parse_leaf(self._read(data, size), self._position)
            self._position = data + size + padding(size)
