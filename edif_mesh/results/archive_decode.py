"""Tree and storages -> values. Takes every number in the tree for hostile; imports only what stands in its own table."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import torch

from edif_mesh.errors import ArchiveError
from edif_mesh.results.archive_types import (
    DTYPES,
    MAX_DEPTH,
    MAX_DIMENSIONS,
    MAX_NODES,
    MODEL_OUTPUTS,
    NUMPY_KINDS,
    Record,
)

Node = Any


class Decoder:
    """Rebuilds the values of one archive over its storages (one-dimensional uint8 tensors)."""

    def __init__(self, storages: list[torch.Tensor], classes: dict[str, type]) -> None:
        self._storages = storages
        self._classes = classes
        self._memo: list[Any] = []
        self._nodes = 0
        self._rules: dict[str, Callable[[dict[str, Any], int], Any]] = {
            "list": lambda n, d: self._items(n, d),
            "tuple": lambda n, d: tuple(self._items(n, d)),
            "set": lambda n, d: _hashed(set, self._items(n, d)),
            "frozenset": lambda n, d: _hashed(frozenset, self._items(n, d)),
            "dict": lambda n, d: _hashed(dict, self._pairs(n, d)),
            "ordered": lambda n, d: _hashed(OrderedDict, self._pairs(n, d)),
            "slice": self._slice,
            "enum": self._enum,
            "namedtuple": self._namedtuple,
            "object": self._object,
            "tensor": lambda n, d: self._tensor(n),
            "coo": lambda n, d: self._sparse(n, d),
            "csr": lambda n, d: self._sparse(n, d),
            "ndarray": lambda n, d: self._numpy(n),
            "npscalar": lambda n, d: self._numpy(n)[()],
            "batch_encoding": self._batch_encoding,
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
            except (TypeError, ValueError, KeyError, OverflowError, RuntimeError, IndexError, AttributeError) as error:
                raise ArchiveError(f"The archive's value {pair[0]!r} is malformed: {str(error)[:200]}") from error
        return result

    def node(self, node: Node, depth: int) -> Any:
        """Decode one node."""
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > 2 * MAX_DEPTH:
            raise ArchiveError("The archive's tree is too large or too deep.")
        if node is None or isinstance(node, bool | str | int | float):
            return node
        if not isinstance(node, dict):
            raise ArchiveError("The archive's tree has a node that is no object.")
        kind = node.get("t")
        if kind == "ref":
            return self._memo[_int(node["i"], 0, len(self._memo) - 1)]
        small = _SMALL.get(str(kind))
        if small is not None:
            return small(node["v"] if "v" in node else None)
        if kind in ("bytes", "bytearray"):
            data = bytes(self._storage(node["s"]).numpy())
            return data if kind == "bytes" else bytearray(data)
        rule = self._rules.get(str(kind))
        if rule is None:
            raise ArchiveError(f"The archive's tree has a node of the unknown kind {str(kind)[:40]!r}.")
        value = rule(node, depth + 1)
        self._memo.append(value)
        return value

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
        result = {}
        for pair in _list(node["v"]):
            name, value = _list(pair)
            if not isinstance(name, str):
                raise ArchiveError("The archive has an attribute without a name.")
            result[name] = self.node(value, depth)
        return result

    # ------------------------------------------------------------------------------------------------- named classes

    def _enum(self, node: dict[str, Any], depth: int) -> Any:
        value, cls = self.node(node["v"], depth), self._classes.get(str(node["c"]))
        if cls is not None:
            return cls[str(node["n"])]  # type: ignore[index]
        return Record(str(node["c"]), {"name": str(node["n"]), "value": value})

    def _namedtuple(self, node: dict[str, Any], depth: int) -> Any:
        fields, name = self._fields(node, depth), str(node["c"])
        cls = self._classes.get(name)
        if cls is None:
            cls = namedtuple(name.rpartition(".")[2], list(fields), rename=True)  # type: ignore[misc]
        return cls(*fields.values())

    def _object(self, node: dict[str, Any], depth: int) -> Any:
        fields, name = self._fields(node, depth), str(node["c"])
        cls = self._classes.get(name)
        if cls is None:
            return Record(name, fields)
        value = cls.__new__(cls)
        value.__dict__.update(fields)
        return value

    def _batch_encoding(self, node: dict[str, Any], depth: int) -> Any:
        from transformers import BatchEncoding

        return BatchEncoding(dict(self._pairs(node, depth)))

    def _model_output(self, node: dict[str, Any], depth: int) -> Any:
        from transformers import modeling_outputs
        from transformers.utils import ModelOutput

        pairs, (module, _, name) = dict(self._pairs(node, depth)), str(node["c"]).rpartition(".")
        cls = getattr(modeling_outputs, name, None) if module == MODEL_OUTPUTS else self._classes.get(str(node["c"]))
        if isinstance(cls, type) and issubclass(cls, ModelOutput):
            return cls(**pairs)
        return Record(str(node["c"]), {str(key): value for key, value in pairs.items()})

    def _kv_cache(self, node: dict[str, Any], depth: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, layer in enumerate(_list(node["v"])):
            keys, values = (self.node(part, depth) for part in _list(layer))
            if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
                cache.update(keys, values, number)
        return cache

    def _activation_cache(self, node: dict[str, Any], depth: int) -> Any:
        from edif_mesh.results.nnsight_types import activation_cache

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
        elements = storage.numel() // dtype.itemsize
        if 0 in shape:
            tensor = torch.empty_strided([min(n, 1 << 40) for n in shape], stride, dtype=dtype)
        else:
            if offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) >= elements:
                raise ArchiveError("A tensor reaches beyond its storage.")
            typed = storage[: elements * dtype.itemsize].view(dtype)
            tensor = torch.as_strided(typed, shape, stride, offset)
            if dtype is torch.bool and not bool((storage <= 1).all()):
                raise ArchiveError("A tensor of bool holds bytes that are neither 0 nor 1.")
        if node.get("p") is True:
            return torch.nn.Parameter(tensor, requires_grad=node.get("g") is True)
        return tensor.requires_grad_() if node.get("g") is True else tensor

    def _sparse(self, node: dict[str, Any], depth: int) -> torch.Tensor:
        parts = [self._tensor(part) for part in _list(node["parts"])]
        shape = [_int(n, 0, 1 << 48) for n in _list(node["shape"])]
        if node["t"] == "coo":
            indices, values = parts
            result = torch.sparse_coo_tensor(indices, values, shape, check_invariants=True).coalesce()
        else:
            rows, columns, values = parts
            result = torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=True)
        return result.requires_grad_() if node.get("g") is True else result

    def _numpy(self, node: dict[str, Any]) -> Any:
        import numpy as np

        dtype = np.dtype(str(node["d"]))
        if dtype.kind not in NUMPY_KINDS or dtype.hasobject:
            raise ArchiveError(f"numpy data of kind {dtype.kind!r} cannot be in an archive.")
        shape = [_int(n, 0, 1 << 48) for n in _list(node["shape"])]
        return np.frombuffer(self._storage(node["s"]).numpy(), dtype=dtype).reshape(shape)


def _hashed(kind: Callable[[Any], Any], items: Any) -> Any:
    result = kind(items)
    if len(result) != len(items):
        raise ArchiveError("A set or dictionary holds the same key twice.")
    return result


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
    "range": lambda v: range(*(_int(n, -(1 << 53), 1 << 53) for n in _list(v))),
    "ellipsis": lambda v: ...,
}
