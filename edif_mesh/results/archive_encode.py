"""Values -> tree and storages. Runs in the sandboxed child; refuses by name what cannot be represented without code."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, SimpleNamespace
from typing import Any, NoReturn

import torch

from edif_mesh.errors import UnsupportedValueError
from edif_mesh.results.archive_encode_libraries import library_node
from edif_mesh.results.archive_encode_tensors import is_plain_tensor, numpy_node, tensor_node
from edif_mesh.results.archive_plain import encode_plain
from edif_mesh.results.archive_refusals import way_out
from edif_mesh.results.archive_types import (
    DEFAULT_FACTORIES,
    MAX_DEPTH,
    MAX_ENCODING_BYTES,
    MAX_EXPANDED,
    MAX_KEY_NODES,
    MAX_NODES,
    QUANTIZED,
    Extent,
    Node,
    is_small_key,
)
from edif_mesh.results.archive_views import Views

_SAFE_INT = 1 << 53
_DICTS = {dict: "dict", OrderedDict: "ordered", defaultdict: "defaultdict", Counter: "counter"}


class Encoder:
    """Builds the tree of one result; `storages` are the raw bytes that its tensors point into."""

    def __init__(self, wire_dtype: str = "") -> None:
        self.storages: list[memoryview] = []
        self.elements: list[int] = []
        """Bytes of one number in each storage; 0 where that is not known."""
        self._views = Views(lambda data, element: self.add(lambda: data, element), wire_dtype)
        self._extent = Extent()
        self._left = MAX_NODES
        self._encoding_bytes = 0
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
        if not self._extent.add(depth, 0, 1):
            self._too_large(path, type(value))
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
        if kind is bytes or kind is bytearray:
            return {"t": kind.__name__, "s": self.add(lambda: memoryview(bytes(value)))}
        small = encode_plain(value, kind, path)
        if small is not None:
            return small
        if id(value) in self._memo:
            known = self._memo[id(value)]
            if known is None:
                raise UnsupportedValueError(path, kind.__name__, "It contains itself; save its parts.")
            if not self._extent.add(depth, known[1], known[2]):
                self._too_large(path, kind)
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

    def _too_large(self, path: str, kind: type) -> NoReturn:
        hint = f"It is nested deeper than {MAX_DEPTH} or holds more than {MAX_EXPANDED:,} parts; save tensors instead."
        raise UnsupportedValueError(path, kind.__name__, hint)

    # --------------------------------------------------------------------------------------------------- compounds

    def _compound(self, value: Any, kind: type, path: str, depth: int) -> Node:
        if isinstance(value, torch.Tensor):
            return tensor_node(self, value, path)
        if kind in (list, tuple, set, frozenset):
            items = [self.node(v, f"{path}[{i}]", depth) for i, v in enumerate(value)]
            if kind in (set, frozenset):
                self._check_keys(value, path, kind)
            return {"t": kind.__name__, "v": items}
        if kind is deque:
            items = [self.node(v, f"{path}[{i}]", depth) for i, v in enumerate(value)]
            return {"t": "deque", "v": items, "m": value.maxlen}
        if kind in _DICTS:
            node: Node = {"t": _DICTS[kind], "v": self._pairs(value, path, depth)}
            if kind is defaultdict:
                node["f"] = next((n for n, f in DEFAULT_FACTORIES.items() if f is value.default_factory), None)
            return node
        if kind is slice:
            return {"t": "slice", "v": [self.node(v, path, depth) for v in (value.start, value.stop, value.step)]}
        if isinstance(value, enum.Enum):
            return {"t": "enum", "c": _name(kind), "n": value.name, "v": self.node(value.value, f"{path}.value", depth)}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields = [[f, self.node(getattr(value, f), f"{path}.{f}", depth)] for f in value._fields]
            return {"t": "namedtuple", "c": _name(kind), "v": fields}
        if kind.__module__ == "torch.return_types":
            items = [self.node(v, f"{path}[{i}]", depth) for i, v in enumerate(value)]
            return {"t": "torch_return", "c": kind.__name__, "v": items}
        return self._of_a_class(value, kind, path, depth)

    def _of_a_class(self, value: Any, kind: type, path: str, depth: int) -> Node:
        """Values of libraries, then those of the researcher's own classes."""
        module = kind.__module__.split(".")[0]
        if module == "numpy":
            return numpy_node(self, value, path)
        if any(c.__name__ == "ModelOutput" and c.__module__.startswith("transformers.") for c in kind.__mro__):
            return {"t": "model_output", "c": _name(kind), "v": self._pairs(value, path, depth)}
        if module in ("transformers", "tokenizers", "nnsight"):
            node = library_node(self, value, kind, path, depth)
            if node is not None:
                return node
        attributes = None if isinstance(value, type) else attributes_of(value, kind)
        if isinstance(value, dict | list | tuple | set | frozenset):
            if attributes or attributes is None:
                hint = f"Save {'dict' if isinstance(value, dict) else 'list'}(...) of it, and its attributes by themselves."
                raise UnsupportedValueError(path, f"{kind.__name__} with attributes of its own", hint)
            plain = _plain(value)
            return self._compound(plain, type(plain), path, depth)
        if attributes is None:
            raise UnsupportedValueError(path, kind.__name__, way_out(value, kind))
        pairs = [[n, self.node(v, f"{path}.{n}", depth)] for n, v in attributes.items()]
        return (
            {"t": "namespace", "v": pairs} if kind is SimpleNamespace else {"t": "object", "c": _name(kind), "v": pairs}
        )

    def _pairs(self, value: Mapping[Any, Any], path: str, depth: int) -> list[Node]:
        nodes = [[self.node(k, f"{path} key", depth), self.node(v, f"{path}[{k!r}]", depth)] for k, v in value.items()]
        self._check_keys(value, path, type(value))
        return nodes

    def _check_keys(self, keys: Iterable[Any], path: str, kind: type) -> None:
        if not all(is_small_key(key) for key in keys if isinstance(key, tuple | frozenset)):
            hint = f"One of its keys has more than {MAX_KEY_NODES:,} parts; save a list of pairs instead."
            raise UnsupportedValueError(path, kind.__name__, hint)

    # ----------------------------------------------------------------------------------------- asked for by the rules

    def integers(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the integers of a quantized tensor."""
        return tensor.int_repr()

    def place(self, tensor: torch.Tensor, node: dict[str, Any]) -> Node:
        """Take a strided tensor; its node is completed once all tensors are known."""
        return self._views.add(tensor, node)

    def add_encoding(self, data: bytes, path: str) -> int:
        """Take the JSON of a tokenizer's encoding; return its storage's number."""
        self._encoding_bytes += len(data)
        if self._encoding_bytes > MAX_ENCODING_BYTES:
            hint = f"Encodings take more than {MAX_ENCODING_BYTES >> 20} MiB together; save their ids as tensors."
            raise UnsupportedValueError(path, "Encoding", hint)
        return self.add(lambda: memoryview(data))

    def add(self, data: Callable[[], memoryview], element: int = 0) -> int:
        """Take a storage; return its number."""
        self.storages.append(data())
        self.elements.append(element)
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

    def node(self, value: Any, path: str, depth: int) -> Node:
        """Look at one value; what needs no second look costs little."""
        if type(value) in _SIMPLE or is_plain_tensor(value):
            self._left -= 1
            if self._left < 0:
                raise _EnoughError
            return None
        return super().node(value, path, depth)

    def _spent(self, path: str, kind: type) -> NoReturn:
        raise _EnoughError

    def integers(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of their dtype, without the copy."""
        return torch.empty(0, dtype=QUANTIZED[str(tensor.dtype).removeprefix("torch.")])

    def place(self, tensor: torch.Tensor, node: dict[str, Any]) -> Node:
        """Leave the tensor where it is."""
        return node

    def add(self, data: Callable[[], memoryview], element: int = 0) -> int:
        """Leave the data where they are."""
        return 0


_SIMPLE = frozenset({int, float, str, bool, type(None)})


class _EnoughError(Exception):
    pass


def attributes_of(value: Any, kind: type) -> dict[str, Any] | None:
    """The attributes of an instance of the researcher's own class, or None when they are not all that it is.

    A class of the standard library, of a library whose objects hold the outside world, or with a base written in C has a
    state that its attributes do not show.
    """
    if callable(value) and not dataclasses.is_dataclass(value):
        return None
    slots: list[str] = []
    for base in kind.__mro__:
        if base in _PLAIN_BASES:
            continue
        foreign = base.__module__.split(".")[0] in _NOT_OURS and not dataclasses.is_dataclass(base)
        in_c = not base.__flags__ & _HEAP_TYPE or isinstance(base.__dict__.get("__new__"), BuiltinFunctionType)
        if foreign or in_c:
            return None
        own = base.__dict__.get("__slots__", ())
        slots += [f"_{base.__name__.lstrip('_')}{s}" if s.startswith("__") and not s.endswith("__") else s
                  for s in ([own] if isinstance(own, str) else own)]  # fmt: skip
    names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    names += [*slots, *getattr(value, "__dict__", ())]
    names = [n for n in dict.fromkeys(names) if isinstance(n, str) and not n.startswith("__")]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


_HEAP_TYPE = 1 << 9
_PLAIN_BASES = (object, dict, list, tuple, set, frozenset, OrderedDict, defaultdict, SimpleNamespace)
_NOT_OURS = (sys.stdlib_module_names - {"__main__", "test", "this", "abc", "typing"}) | set(
    "torch transformers nnsight tokenizers numpy pandas polars PIL matplotlib accelerate peft huggingface_hub".split()
)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_scalar_subclass(value: Any, kind: type) -> bool:
    """A subclass of a plain scalar that adds nothing that can be kept; enums and numpy scalars have forms of their own."""
    return (
        kind not in (str, int, float, bytes, bool) and not isinstance(value, enum.Enum) and kind.__module__ != "numpy"
    )


def _plain(value: Any) -> Any:
    """The builtin value inside an instance of a subclass."""
    base: Any = next(
        b
        for b in (Counter, OrderedDict, dict, list, tuple, set, frozenset, str, int, float, bytes)
        if isinstance(value, b)
    )
    return base(value)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
