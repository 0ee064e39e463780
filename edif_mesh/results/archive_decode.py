"""Tree and storages -> values. Takes every number in the tree for hostile; imports only what stands in its own table."""

from __future__ import annotations

import enum
import math
import sys
import warnings
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from edif_mesh.errors import ArchiveError
from edif_mesh.results.archive_types import (
    DEFAULT_FACTORIES,
    DTYPES,
    KV_LAYERS,
    MAX_DIMENSIONS,
    MAX_KEY_NODES,
    MAX_NODES,
    MAX_REPEAT,
    MODEL_OUTPUTS,
    NUMPY_DTYPE,
    SMALL_BYTES,
    EnumRecord,
    Extent,
    Record,
)
from edif_mesh.results.nnsight_types import activation_cache

Node = Any


class Decoder:
    """Rebuilds the values of one archive over its storages (one-dimensional uint8 tensors)."""

    def __init__(self, storages: list[torch.Tensor], classes: dict[str, type]) -> None:
        self._storages = storages
        self._classes = classes
        self._memo: list[tuple[Any, int, int]] = []
        self._extent = Extent()
        self._nodes = 0
        self._clean_bools: set[int] = set()
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
            "tensor": lambda n, d: self._tensor(n),
            "coo": lambda n, d: self._sparse(n, d),
            "csr": lambda n, d: self._sparse(n, d),
            "ndarray": lambda n, d: self._numpy(n),
            "npscalar": lambda n, d: self._numpy(n)[()],
            "batch_encoding": self._batch,
            "batch_feature": self._batch,
            "model_output": self._model_output,
            "kv_cache": self._kv_cache,
            "activation_cache": self._activation_cache,
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
            value, height, weight = self._memo[_int(node["i"], 0, len(self._memo) - 1)]
            self._visit(depth, height, weight)
            return value
        small = _SMALL.get(str(kind))
        if small is not None:
            return small(node.get("v"))
        if kind in ("bytes", "bytearray"):
            data = bytes(self._storage(node["s"]).numpy())
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
        return [self.node(item, depth) for item in _list(node["v"])]

    def _pairs(self, node: dict[str, Any], depth: int) -> list[tuple[Any, Any]]:
        result = []
        for pair in _list(node["v"]):
            key, value = _list(pair)
            result.append((self.node(key, depth), self.node(value, depth)))
        return result

    def _slice(self, node: dict[str, Any], depth: int) -> slice:
        start, stop, step = self._items(node, depth)
        return slice(start, stop, step)

    def _fields(self, node: dict[str, Any], depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for pair in _list(node["v"]):
            name, value = _list(pair)
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
            return cls[str(node["n"])]
        return EnumRecord(str(node["c"]), {"name": str(node["n"]), "value": value})

    def _namedtuple(self, node: dict[str, Any], depth: int) -> Any:
        fields, cls = self._fields(node, depth), self._class(node, tuple)
        if cls is not None and getattr(cls, "_fields", None) == tuple(fields):
            return tuple.__new__(cls, fields.values())
        key = (str(node["c"]).rpartition(".")[2], *fields)
        if key not in self._namedtuples:
            self._namedtuples[key] = namedtuple(key[0], key[1:])
        return self._namedtuples[key](*fields.values())

    def _object(self, node: dict[str, Any], depth: int) -> Any:
        fields, cls = self._fields(node, depth), self._class(node, object)
        if cls is None:
            return Record(str(node["c"]), fields)
        value = cls.__new__(cls)
        for name, field in fields.items():
            object.__setattr__(value, name, field)
        return value

    def _torch_return(self, node: dict[str, Any], depth: int) -> Any:
        cls, items = getattr(torch.return_types, str(node["c"]), None), self._items(node, depth)
        if not (isinstance(cls, type) and issubclass(cls, tuple) and cls.__module__ == "torch.return_types"):
            raise ArchiveError("The archive names a result type that torch does not have.")
        return cls(items)

    def _batch(self, node: dict[str, Any], depth: int) -> Any:
        from transformers import BatchEncoding, BatchFeature

        cls = BatchEncoding if node["t"] == "batch_encoding" else BatchFeature
        return cls(_hashed(dict, self._pairs(node, depth)))

    def _model_output(self, node: dict[str, Any], depth: int) -> Any:
        from transformers.utils import ModelOutput

        pairs, (module, _, name) = _hashed(dict, self._pairs(node, depth)), str(node["c"]).rpartition(".")
        cls = self._class(node, ModelOutput)
        if module in MODEL_OUTPUTS:
            cls = getattr(import_module(MODEL_OUTPUTS[MODEL_OUTPUTS.index(module)]), name, None)
        if isinstance(cls, type) and issubclass(cls, ModelOutput):
            return cls(**pairs)
        return Record(str(node["c"]), {str(key): value for key, value in pairs.items()})

    def _kv_cache(self, node: dict[str, Any], depth: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.layers = [self._kv_layer(_list(layer), depth) for layer in _list(node["v"])]
        return cache

    def _kv_layer(self, layer: list[Node], depth: int) -> Any:
        from transformers import cache_utils

        name, *parts = layer
        settings = dict(zip(KV_LAYERS[name], (self.node(v, depth) for v in _list(parts[2])), strict=True))
        if not all(type(number) is int for number in settings.values()):
            raise ArchiveError("A cache layer's settings are no numbers.")
        keys, values = self.node(parts[0], depth), self.node(parts[1], depth)
        made = getattr(cache_utils, name)(**{k: v for k, v in settings.items() if k == "sliding_window"})
        made.__dict__.update(settings)
        if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
            made.lazy_initialization(keys, values)
            made.keys, made.values = keys, values
        return made

    def _activation_cache(self, node: dict[str, Any], depth: int) -> Any:
        entries = {}
        for pair in _list(node["v"]):
            where, visits = _list(pair)
            entries[str(where)] = [
                (self.node(_list(visit)[0], depth), self.node(_list(visit)[1], depth)) for visit in _list(visits)
            ]
        return activation_cache(entries)

    # ------------------------------------------------------------------------------------------------------- tensors

    def _storage(self, number: Any) -> torch.Tensor:
        return self._storages[_int(number, 0, len(self._storages) - 1)]

    def _tensor(self, node: dict[str, Any]) -> torch.Tensor:
        dtype, storage = DTYPES[str(node["d"])], self._storage(node["s"])
        shape = [_int(n, 0, 1 << 48) for n in _list(node["shape"])]
        stride = [_int(n, 0, 1 << 48) for n in _list(node["stride"])]
        offset = _int(node["o"], 0, 1 << 48)
        if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
            raise ArchiveError("A tensor's shape and strides do not fit each other.")
        elements, amount = storage.numel() // dtype.itemsize, math.prod(shape)
        if amount == 0:
            tensor = torch.empty(0, dtype=dtype).as_strided(shape, stride)
        else:
            if offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) >= elements:
                raise ArchiveError("A tensor reaches beyond its storage.")
            if amount * dtype.itemsize > max(SMALL_BYTES, MAX_REPEAT * storage.numel()):
                raise ArchiveError("A tensor repeats its storage too often.")
            if dtype is torch.bool:
                self._check_bools(node["s"])
            typed = storage[: elements * dtype.itemsize].view(dtype)
            tensor = torch.as_strided(typed, shape, stride, offset)
        if node.get("p") is True:
            return torch.nn.Parameter(tensor, requires_grad=node.get("g") is True)
        return tensor.requires_grad_() if node.get("g") is True else tensor

    def _check_bools(self, number: int) -> None:
        if number not in self._clean_bools:
            if not bool((self._storages[number] <= 1).all()):
                raise ArchiveError("A tensor of bool holds bytes that are neither 0 nor 1.")
            self._clean_bools.add(number)

    def _sparse(self, node: dict[str, Any], depth: int) -> torch.Tensor:
        parts = [self._tensor(part) for part in _list(node["parts"])]
        shape = [_int(n, 0, 1 << 48) for n in _list(node["shape"])]
        if node["t"] == "coo":
            indices, values = parts
            result = torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)
            result = result.coalesce() if node.get("k") is True else result
        else:
            rows, columns, values = parts
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                result = torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=True)
        return result.requires_grad_() if node.get("g") is True else result

    def _numpy(self, node: dict[str, Any]) -> Any:
        import numpy as np

        name = node["d"]
        if not isinstance(name, str) or not NUMPY_DTYPE.fullmatch(name):
            raise ArchiveError(f"numpy data of type {str(name)[:40]!r} cannot be in an archive.")
        dtype, raw = np.dtype(name), self._storage(node["s"]).numpy()
        shape = [_int(n, 0, 1 << 48) for n in _list(node["shape"])]
        if math.prod(shape) * dtype.itemsize != raw.nbytes or len(shape) > MAX_DIMENSIONS:
            raise ArchiveError("A numpy array does not fit its bytes.")
        if dtype.kind == "b":
            self._check_bools(node["s"])
        if dtype.kind == "U" and bool((raw.view(np.dtype(f"{dtype.byteorder}u4")) > sys.maxunicode).any()):
            raise ArchiveError("A numpy array of text holds what is no character.")
        return raw.view(dtype).reshape(shape) if raw.nbytes else np.empty(shape, dtype)


def _hashed(kind: Callable[[Any], Any], items: list[Any]) -> Any:
    """Build a set or dictionary; refuse keys whose hash would walk a huge or shared structure, and double keys."""
    for item in items:
        _check_key(item[0] if kind in (dict, OrderedDict) else item)
    result = kind(items)
    if len(result) != len(items):
        raise ArchiveError("A set or dictionary holds the same key twice.")
    return result


def _check_key(key: Any) -> None:
    stack, count = [key], 0
    while stack:
        part = stack.pop()
        count += 1
        if count > MAX_KEY_NODES:
            raise ArchiveError("A key of a set or dictionary is too large.")
        if isinstance(part, tuple | frozenset):
            stack.extend(part)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ArchiveError("The archive's tree has no list where one must be.")
    return value


def _int(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ArchiveError(f"The archive's tree has {str(value)[:30]!r} where a number from {low} to {high} must be.")
    return value


def _device(text: Any) -> torch.device:
    return torch.device(str(text)[:20])


_SMALL: dict[str, Callable[[Any], Any]] = {
    "int": lambda v: int(v, 16),
    "float": lambda v: {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}[v],
    "complex": lambda v: complex(float(v[0]), float(v[1])),
    "surrogates": lambda v: "".join(map(chr, _list(v))),
    "size": lambda v: torch.Size([_int(n, 0, 1 << 48) for n in _list(v)]),
    "dtype": lambda v: DTYPES[str(v)],
    "device": _device,
    "range": lambda v: range(*(_int(n, -(1 << 63), 1 << 63) for n in _list(v))),
    "ellipsis": lambda v: ...,
}
