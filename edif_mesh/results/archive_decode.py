"""Tree and storages -> values. Takes every number in the tree for hostile; imports only what stands in its own table."""

from __future__ import annotations

import enum
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from edif_mesh.errors import ArchiveError
from edif_mesh.results.archive_decode_libraries import Libraries
from edif_mesh.results.archive_decode_tensors import TENSOR_KINDS, Tensors
from edif_mesh.results.archive_plain import DECODE
from edif_mesh.results.archive_types import (
    DEFAULT_FACTORIES,
    MAX_NODES,
    EnumRecord,
    Extent,
    Node,
    Record,
    as_int,
    as_list,
    is_small_key,
)


class Decoder:
    """Rebuilds the values of one archive over its storages (one-dimensional uint8 tensors)."""

    def __init__(
        self, storages: list[torch.Tensor], classes: dict[str, type], *, tensors: Tensors | None = None
    ) -> None:
        """`tensors` makes them in its own way."""
        self._tensors = tensors or Tensors(storages, sum(storage.numel() for storage in storages))
        self._classes = classes
        self._memo: list[tuple[Any, int, int]] = []
        self._extent = Extent()
        self._nodes = 0
        self._namedtuples: dict[tuple[str, ...], type] = {}
        self._rules: dict[str, Callable[[dict[str, Any], int], Any]] = {
            "list": lambda n, d: self._items(n, d),
            "tuple": lambda n, d: tuple(self._items(n, d)),
            "set": lambda n, d: _hashed(set, self._items(n, d)),
            "frozenset": lambda n, d: _hashed(frozenset, self._items(n, d)),
            "dict": lambda n, d: _hashed(dict, self._pairs(n, d)),
            "ordered": lambda n, d: _hashed(OrderedDict, self._pairs(n, d)),
            "defaultdict": lambda n, d: defaultdict(
                DEFAULT_FACTORIES.get(str(n["f"])), _hashed(dict, self._pairs(n, d))
            ),
            "torch_return": self._torch_return,
            "slice": self._slice,
            "enum": self._enum,
            "namedtuple": self._namedtuple,
            "object": self._object,
            "counter": lambda n, d: Counter(self._hashed_pairs(n, d)),
            "deque": self._deque,
            "namespace": lambda n, d: SimpleNamespace(**self._fields(n, d)),
            **{kind: lambda n, d: self._tensors.tensor(n) for kind in TENSOR_KINDS},
            "ndarray": lambda n, d: self._tensors.numpy(n),
            "ndarray_by_column": lambda n, d: self._tensors.numpy(n),
            "npscalar": lambda n, d: self._tensors.numpy(n)[()],
            **Libraries(self.node, self._hashed_pairs, self._tensors.take, self._classes).rules,
        }

    def mapping(self, values: list[Node]) -> dict[str, Any]:
        """Decode the list of `[name, node]`; raises ArchiveError for anything else."""
        result: dict[str, Any] = {}
        for pair in values:
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)) or pair[0] in result:
                raise ArchiveError("The archive's values are not names with one value each.")
            try:
                result[pair[0]] = self.node(pair[1], 0)
            except ArchiveError:
                raise
            except Exception as error:
                raise ArchiveError(f"The archive's value {pair[0][:80]!r} is malformed: {str(error)[:200]}") from error
        return result

    def node(self, node: Node, depth: int) -> Any:
        """Decode one node."""
        self._nodes += 1
        self._visit(depth, 0, 1)
        if node is None or isinstance(node, bool | str | int | float):
            return node
        if not isinstance(node, dict):
            raise ArchiveError("The archive's tree has a node that is no object.")
        kind = node.get("t")
        if kind == "ref":
            value, height, weight = self._memo[as_int(node["i"], 0, len(self._memo) - 1)]
            self._visit(depth, height, weight)
            return value
        plain = DECODE.get(str(kind))
        if plain is not None:
            return plain(node)
        if kind in ("bytes", "bytearray"):
            data = self._tensors.take(node["s"])
            return data if kind == "bytes" else bytearray(data)
        rule = self._rules.get(str(kind))
        if rule is None:
            raise ArchiveError(f"The archive's tree has a node of the unknown kind {str(kind)[:40]!r}.")
        outer = self._extent.enter(depth)
        value = rule(node, depth + 1)
        _, height, weight = self._extent.leave(depth, outer)
        self._memo.append((value, height, weight))
        return value

    def _visit(self, depth: int, height: int, weight: int) -> None:
        if not self._extent.add(depth, height, weight) or self._nodes > MAX_NODES:
            raise ArchiveError("The archive's tree is too large or too deep.")

    # ---------------------------------------------------------------------------------------------------- containers

    def _items(self, node: dict[str, Any], depth: int) -> list[Any]:
        return [self.node(item, depth) for item in as_list(node["v"])]

    def _pairs(self, node: dict[str, Any], depth: int) -> list[tuple[Any, Any]]:
        result = []
        for pair in as_list(node["v"]):
            key, value = as_list(pair)
            result.append((self.node(key, depth), self.node(value, depth)))
        return result

    def _hashed_pairs(self, node: dict[str, Any], depth: int) -> Any:
        return _hashed(dict, self._pairs(node, depth))

    def _deque(self, node: dict[str, Any], depth: int) -> deque[Any]:
        items, longest = self._items(node, depth), node["m"]
        return deque(items, None if longest is None else as_int(longest, len(items), sys.maxsize))

    def _slice(self, node: dict[str, Any], depth: int) -> slice:
        start, stop, step = self._items(node, depth)
        return slice(start, stop, step)

    def _fields(self, node: dict[str, Any], depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for pair in as_list(node["v"]):
            name, value = as_list(pair)
            if not isinstance(name, str) or name.startswith("__") or name in result:
                raise ArchiveError("The archive has an attribute without a name of its own.")
            result[name] = self.node(value, depth)
        return result

    # ------------------------------------------------------------------------------------------------- named classes

    def _class(self, node: dict[str, Any], base: type) -> Any:
        """The caller's own class for the node, when it named one of that kind."""
        cls = self._classes.get(str(node["c"]))
        return cls if isinstance(cls, type) and issubclass(cls, base) else None

    def _enum(self, node: dict[str, Any], depth: int) -> Any:
        value, cls = self.node(node["v"], depth), self._class(node, enum.Enum)
        if cls is not None:
            return cls(value) if issubclass(cls, enum.Flag) else cls[str(node["n"])]
        return EnumRecord(str(node["c"]), {"name": str(node["n"]), "value": value})

    def _namedtuple(self, node: dict[str, Any], depth: int) -> Any:
        fields, cls = self._fields(node, depth), self._class(node, tuple)
        if cls is not None and getattr(cls, "_fields", None) == tuple(fields):
            return tuple.__new__(cls, fields.values())
        key = (str(node["c"]).rpartition(".")[2], *fields)
        if key not in self._namedtuples:
            renamed = any(name == f"_{number}" for number, name in enumerate(fields))
            self._namedtuples[key] = namedtuple(key[0], key[1:], rename=renamed)
            if self._namedtuples[key]._fields != tuple(fields):  # type: ignore[attr-defined]
                raise ArchiveError("A named tuple's fields have no names.")
        return self._namedtuples[key](*fields.values())

    def _object(self, node: dict[str, Any], depth: int) -> Any:
        fields, cls = self._fields(node, depth), self._class(node, object)
        if cls is None:
            return Record(str(node["c"]), fields)
        if hasattr(cls, "model_construct"):  # pydantic's own way without validation
            return cls.model_construct(**fields)
        value = cls.__new__(cls)
        for name, field in fields.items():
            object.__setattr__(value, name, field)
        return value

    def _torch_return(self, node: dict[str, Any], depth: int) -> Any:
        cls, items = getattr(torch.return_types, str(node["c"]), None), self._items(node, depth)
        if not (isinstance(cls, type) and issubclass(cls, tuple) and cls.__module__ == "torch.return_types"):
            raise ArchiveError("The archive names a result type that torch does not have.")
        return cls(items)


def _hashed(kind: Callable[[Any], Any], items: list[Any]) -> Any:
    """Build a set or dictionary; refuse keys whose hash would walk a huge or shared structure, and double keys."""
    for item in items:
        if not is_small_key(item if kind in (set, frozenset) else item[0]):
            raise ArchiveError("A key of a set or dictionary is too large.")
    result = kind(items)
    if len(result) != len(items):
        raise ArchiveError("A set or dictionary holds the same key twice.")
    return result
