"""Values -> tree and storages. Runs in the sandboxed child; refuses by name what cannot be represented without code."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from edif_mesh.errors import UnsupportedValueError
from edif_mesh.results.archive_types import (
    DEFAULT_FACTORIES,
    KV_LAYERS,
    MAX_DEPTH,
    MAX_EXPANDED,
    MAX_NODES,
    NAMES,
    NUMPY_KINDS,
    Extent,
)
from edif_mesh.results.archive_views import Views

Node = Any
_SAFE_INT = 1 << 53
_HINTS = {
    "Module": "Save its state_dict() instead.",
    "function": "Save what it returns instead.",
    "generator": "Save list(...) of it instead.",
    "Envoy": "Save its .output instead.",
}


class Encoder:
    """Builds the tree of one result; `storages` are the raw bytes that its tensors point into."""

    def __init__(self) -> None:
        self.storages: list[memoryview] = []
        self._views = Views(lambda data: self._add(lambda: data))
        self._extent = Extent()
        self._left = MAX_NODES
        self._memo: dict[int, tuple[int, int, int] | None] = {}
        self._kept: list[Any] = []

    def mapping(self, values: Mapping[str, Any]) -> list[Node]:
        """Encode the saved values of a job: a list of `[name, node]`."""
        nodes = [[str(name), self.node(value, str(name), 0)] for name, value in values.items()]
        self._views.place()
        return nodes

    def node(self, value: Any, path: str, depth: int) -> Node:
        """Encode one value; `path` is how the researcher would write it."""
        self._left -= 1
        if self._left < 0:
            self._spent(path, type(value))
        if value is None or value is True or value is False:
            return value
        kind = type(value)
        if isinstance(value, str | int | float | bytes) and _is_scalar_subclass(value, kind):
            value = _plain(value)
            kind = type(value)
        if kind is str:
            return value if value.isascii() or _encodable(value) else {"t": "surrogates", "v": list(map(ord, value))}
        if kind is int:
            return value if -_SAFE_INT < value < _SAFE_INT else {"t": "int", "v": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"t": "float", "v": repr(value)}
        self._visit(path, kind, depth, 0, 1)
        small = self._small(value, kind)
        if small is not None:
            return small
        if id(value) in self._memo:
            known = self._memo[id(value)]
            if known is None:
                raise UnsupportedValueError(path, kind.__name__, "It contains itself; save its parts.")
            self._visit(path, kind, depth, known[1], known[2])
            return {"t": "ref", "i": known[0]}
        self._memo[id(value)] = None
        self._kept.append(value)
        outer = self._extent.enter(depth)
        node = self._compound(value, kind, path, depth + 1)
        self._memo[id(value)] = self._extent.leave(depth, outer)
        return node

    def _spent(self, path: str, kind: type) -> NoReturn:
        raise UnsupportedValueError(
            path, kind.__name__, f"It is one of more than {MAX_NODES:,} parts of this result; save tensors instead."
        )

    def _visit(self, path: str, kind: type, depth: int, height: int, weight: int) -> None:
        if not self._extent.add(depth, height, weight):
            hint = (
                f"It is nested deeper than {MAX_DEPTH} or holds more than {MAX_EXPANDED:,} parts; save tensors instead."
            )
            raise UnsupportedValueError(path, kind.__name__, hint)

    # ------------------------------------------------------------------------------------------------ small values

    def _small(self, value: Any, kind: type) -> Node | None:
        if kind is bytes or kind is bytearray:
            return {"t": kind.__name__, "s": self._add(lambda: memoryview(bytes(value)))}
        if kind is complex:
            return {"t": "complex", "v": [repr(value.real), repr(value.imag)]}
        if kind is torch.Size:
            return {"t": "size", "v": list(value)}
        if kind is torch.dtype:
            return {"t": "dtype", "v": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"t": "device", "v": str(value)}
        if kind is range:
            return {"t": "range", "v": [value.start, value.stop, value.step]}
        if value is Ellipsis:
            return {"t": "ellipsis"}
        return None

    # --------------------------------------------------------------------------------------------------- compounds

    def _compound(self, value: Any, kind: type, path: str, depth: int) -> Node:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if kind in (list, tuple, set, frozenset):
            return {"t": kind.__name__, "v": [self.node(v, f"{path}[{i}]", depth) for i, v in enumerate(value)]}
        if kind is defaultdict:
            factory = next((n for n, f in DEFAULT_FACTORIES.items() if f is value.default_factory), None)
            return {"t": "defaultdict", "f": factory, "v": self._pairs(value, path, depth)}
        if kind in (dict, OrderedDict):
            name = "ordered" if kind is OrderedDict else "dict"
            return {"t": name, "v": self._pairs(value, path, depth)}
        if kind is slice:
            return {"t": "slice", "v": [self.node(v, path, depth) for v in (value.start, value.stop, value.step)]}
        if isinstance(value, enum.Enum):
            return {"t": "enum", "c": _name(kind), "n": value.name, "v": self.node(value.value, path, depth)}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields = [[f, self.node(getattr(value, f), f"{path}.{f}", depth)] for f in value._fields]
            return {"t": "namedtuple", "c": _name(kind), "v": fields}
        if kind.__module__ == "torch.return_types":
            items = [self.node(v, f"{path}[{i}]", depth) for i, v in enumerate(value)]
            return {"t": "torch_return", "c": kind.__name__, "v": items}
        module = kind.__module__.split(".")[0]
        if module == "numpy":
            return self._numpy(value, path)
        if any(c.__name__ == "ModelOutput" and c.__module__.startswith("transformers.") for c in kind.__mro__):
            return {"t": "model_output", "c": _name(kind), "v": self._pairs(value, path, depth)}
        if module in ("transformers", "nnsight"):
            node = self._library(value, kind, path, depth)
            if node is not None:
                return node
        if isinstance(value, torch.nn.Module):
            raise UnsupportedValueError(path, kind.__name__, _HINTS["Module"])
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [f.name for f in dataclasses.fields(value)]
            pairs = [[n, self.node(getattr(value, n), f"{path}.{n}", depth)] for n in names if hasattr(value, n)]
            return {"t": "object", "c": _name(kind), "v": pairs}
        if isinstance(value, dict | list | tuple | set | frozenset):
            plain = _plain(value)
            return self._compound(plain, type(plain), path, depth)
        if self._is_plain_object(value, kind):
            pairs = [[n, self.node(v, f"{path}.{n}", depth)] for n, v in vars(value).items()]
            return {"t": "object", "c": _name(kind), "v": pairs}
        hint = next((_HINTS[c.__name__] for c in kind.__mro__ if c.__name__ in _HINTS), None)
        raise UnsupportedValueError(path, kind.__name__, hint or "Save its tensors, or plain values (.tolist()).")

    def _pairs(self, value: Mapping[Any, Any], path: str, depth: int) -> list[Node]:
        return [[self.node(k, f"{path} key", depth), self.node(v, f"{path}[{k!r}]", depth)] for k, v in value.items()]

    def _is_plain_object(self, value: Any, kind: type) -> bool:
        """The researcher's own class: instances with a dict, from no library whose objects may hold the outside world."""
        module = kind.__module__.split(".")[0]
        return (
            hasattr(value, "__dict__")
            and not callable(value)
            and not isinstance(value, type | BaseException)
            and module not in ("torch", "transformers", "nnsight", "tokenizers", "_io", "io", "threading", "builtins")
        )

    def _numpy(self, value: Any, path: str) -> Node:
        import numpy as np

        plain = type(value) in (np.ndarray, np.memmap) or isinstance(value, np.generic)
        if plain and value.dtype.kind in NUMPY_KINDS and value.dtype.itemsize:

            def data() -> memoryview:
                array = np.ascontiguousarray(value)
                return memoryview(array.reshape(-1).view(np.uint8)) if array.nbytes else memoryview(b"")

            name = "ndarray" if isinstance(value, np.ndarray) else "npscalar"
            return {"t": name, "d": value.dtype.str, "shape": list(value.shape), "s": self._add(data)}
        kind = getattr(getattr(value, "dtype", None), "kind", "?")
        hint = "Save it as a tensor, or .tolist()." if kind != "V" else "Save its fields one by one."
        raise UnsupportedValueError(path, f"numpy {type(value).__name__} of kind {kind!r}", hint)

    def _library(self, value: Any, kind: type, path: str, depth: int) -> Node | None:
        """The data classes of transformers and nnsight that researchers save in practice."""
        name = kind.__name__
        if name in ("BatchEncoding", "BatchFeature"):
            form = "batch_encoding" if name == "BatchEncoding" else "batch_feature"
            return {"t": form, "v": self._pairs(value.data, path, depth)}
        if name == "DynamicCache":
            return {
                "t": "kv_cache",
                "v": [self._kv_layer(c, f"{path}.layers[{i}]", depth) for i, c in enumerate(value.layers)],
            }
        if name.endswith("Cache") and hasattr(value, "layers"):
            raise UnsupportedValueError(
                path, name, "Save its layers' tensors: [(c.keys, c.values) for c in cache.layers]."
            )
        if name == "CacheView":
            cache = object.__getattribute__(value, "_cache")
            entries = [
                [where, [[self.node(e.output, f"{path}[{where!r}].output", depth),
                          self.node(e.inputs, f"{path}[{where!r}].inputs", depth)] for e in visits]]
                for where, visits in cache.entries.items()
            ]  # fmt: skip
            return {"t": "activation_cache", "v": entries}
        return None

    def _kv_layer(self, layer: Any, path: str, depth: int) -> list[Node]:
        """`[class, keys, values, settings]`; only the layers that are two tensors and two numbers."""
        name = type(layer).__name__
        if name not in KV_LAYERS:
            raise UnsupportedValueError(path, name, "Save the tensors of the layer by themselves.")
        settings = [self.node(getattr(layer, a), f"{path}.{a}", depth) for a in KV_LAYERS[name]]
        return [
            name,
            self.node(layer.keys, f"{path}.keys", depth),
            self.node(layer.values, f"{path}.values", depth),
            settings,
        ]

    # ------------------------------------------------------------------------------------------------------ tensors

    def _tensor(self, value: torch.Tensor, path: str) -> Node:
        kind = type(value)
        if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise UnsupportedValueError(path, f"tensor subclass {kind.__name__}", "Save .detach().clone() of its data.")
        tensor = value.detach()
        extra: dict[str, Any] = {"g": True} if value.requires_grad else {}
        if kind is torch.nn.Parameter:
            extra["p"] = True
        if value.is_quantized:
            raise UnsupportedValueError(path, "quantized tensor", "Save .dequantize() of it.")
        if value.layout is torch.sparse_coo:
            extra |= {"k": True} if tensor.is_coalesced() else {}
            return self._sparse("coo", path, tensor._indices(), tensor._values(), tensor.shape, extra)
        if value.layout is torch.sparse_csr:
            rows = tensor.crow_indices(), tensor.col_indices()
            return self._sparse("csr", path, *rows, tensor.values(), tensor.shape, extra)
        if value.layout is not torch.strided or value.is_nested:
            raise UnsupportedValueError(path, f"{value.layout} tensor", "Save .to_dense() or its parts.")
        if value.device.type == "meta" or type(value).__name__ == "FakeTensor":
            raise UnsupportedValueError(path, "tensor without data (meta or fake)", "Save its .shape instead.")
        if value.dtype not in NAMES:
            raise UnsupportedValueError(path, f"tensor of {value.dtype}", "Save .float() or .to(torch.int8) of it.")
        return self._place(tensor, {"t": "tensor", **extra})

    def _place(self, tensor: torch.Tensor, node: dict[str, Any]) -> Node:
        return self._views.add(tensor, node)

    def _sparse(self, form: str, path: str, *parts: Any) -> Node:
        *tensors, shape, extra = parts
        return {"t": form, "parts": [self._tensor(t, path) for t in tensors], "shape": list(shape), **extra}

    def _add(self, data: Callable[[], memoryview]) -> int:
        self.storages.append(data())
        return len(self.storages) - 1


class Check(Encoder):
    """Walks a value by the encoder's own rules and takes no data: types, layouts and dtypes only, of so many parts."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self._left = self._parts = parts

    def look(self, value: Any, path: str) -> int:
        """Return how many parts were looked at, all of them or as many as allowed.

        Raises UnsupportedValueError, naming the part that an archive cannot hold.
        """
        with contextlib.suppress(_EnoughError, RecursionError):
            self.node(value, path, 0)
        return self._parts - max(0, self._left)

    def _spent(self, path: str, kind: type) -> NoReturn:
        raise _EnoughError

    def _place(self, tensor: torch.Tensor, node: dict[str, Any]) -> Node:
        return node

    def _add(self, data: Callable[[], memoryview]) -> int:
        return 0


class _EnoughError(Exception):
    pass


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_scalar_subclass(value: Any, kind: type) -> bool:
    """A subclass of a plain scalar that adds nothing that can be kept; enums and numpy scalars have forms of their own."""
    return (
        kind not in (str, int, float, bytes, bool) and not isinstance(value, enum.Enum) and kind.__module__ != "numpy"
    )


def _plain(value: Any) -> Any:
    """The builtin value inside an instance of a subclass."""
    base: Any = next(b for b in (dict, list, tuple, set, frozenset, str, int, float, bytes) if isinstance(value, b))
    return base(value)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
