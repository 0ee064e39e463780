"""An archive as the `torch.save` file that the unmodified nnsight client loads. Runs in the gateway.

The bytes of a site are never forwarded: they are decoded by the strict reader, and what comes out is written anew. So no
name that a site chose becomes a class in the file: an unknown class arrives as `types.SimpleNamespace` with its
attributes and `type_name`, an unknown enum member as its value, a namedtuple as one with the same fields.
"""

from __future__ import annotations

import collections
import copyreg
import functools
import operator
import pickle
import pydoc
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils.serialization import config

from edif_mesh.results.archive import read
from edif_mesh.results.archive_types import BARE, EnumRecord, Record
from edif_mesh.results.nnsight_types import CACHE_MODULE, ENVOY, SERVED, ActivationCache, CachedVisit, cache_state
from edif_mesh.results.stored_frame import StoredFrame

_Reduced = tuple[Any, ...]


def write_torch_save(archive: bytes | memoryview | Path, out: BinaryIO | Path, *, compress: bool) -> int:
    """Write the values of `archive` to `out` and return how many bytes it took.

    With `compress` it is exactly one zstd frame that declares its content size; see `stored_frame`.

    Raises ArchiveError before anything is written when the archive is not exactly one.
    """
    return write_values(read(archive), out, compress=compress)


def write_values(values: Mapping[str, Any], out: BinaryIO | Path, *, compress: bool) -> int:
    """Write values that are rebuilt already; see `write_torch_save`."""
    if isinstance(out, Path):
        with out.open("wb") as file:
            return write_values(values, file, compress=compress)
    begin = out.tell()
    if not compress:
        _save(values, out)
        return out.tell() - begin
    with StoredFrame(out) as frame:
        _save(values, frame)
    return out.tell() - begin


def _save(values: Mapping[str, Any], out: BinaryIO | StoredFrame) -> None:
    writer = types.SimpleNamespace(__name__="pickle", Pickler=_ClientPickler)
    with config.patch({"save.compute_crc32": False}):
        torch.save(dict(values), out, pickle_module=writer, pickle_protocol=5)


class _Located:
    """A class of the client's libraries, by name; this process need not have imported it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> _Reduced:
        return pydoc.locate, (self.name if "." in self.name else f"{CACHE_MODULE}.{self.name}",)


class _Instance:
    """An object of a located class with these attributes."""

    def __init__(self, kind: str | _Located, state: dict[str, Any]) -> None:
        self.kind = _Located(kind) if isinstance(kind, str) else kind
        self.state = state

    def __reduce__(self) -> _Reduced:
        return copyreg._reconstructor, (self.kind, object, None), self.state  # type: ignore[attr-defined]


class _ClientPickler(pickle.Pickler):
    """Writes our stand-ins as what the client knows; everything else as torch.save does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dtypes: dict[int, torch.dtype] = {}
        self._copies: list[torch.Tensor] = []

    def reducer_override(self, value: Any) -> Any:
        """Return how to write `value`, or NotImplemented for the usual way."""
        if isinstance(value, type):
            return _namedtuple_class(value)
        rule = _RULES.get(type(value)) or _RULES_BY_NAME.get(f"{type(value).__module__}.{type(value).__name__}")
        if rule is not None:
            return rule(value)
        if type(value) is torch.Tensor and value.dtype in BARE:
            return torch.Tensor.view, (value.view(BARE[value.dtype]), value.dtype)
        if type(value) is torch.Tensor and value.layout is torch.strided:
            return self._tensor(value)
        return NotImplemented

    def _tensor(self, value: torch.Tensor) -> Any:
        """torch.save refuses one storage under two dtypes: write a copy for the second."""
        where = value.untyped_storage().data_ptr()
        if where == 0 or self._dtypes.setdefault(where, value.dtype) is value.dtype:
            return NotImplemented
        copy = value.detach().clone().requires_grad_(value.requires_grad)
        self._copies.append(copy)
        self._dtypes[copy.untyped_storage().data_ptr()] = value.dtype
        return copy.__reduce_ex__(5)


def _namedtuple_class(kind: type) -> Any:
    """A namedtuple class that the archive reader made exists nowhere else: the client makes its own."""
    if kind.__module__ == "edif_mesh.results.archive_decode" and hasattr(kind, "_fields"):
        return functools.partial(collections.namedtuple, rename=True), (kind.__name__, kind._fields)
    return NotImplemented


def _record(value: Record) -> _Reduced:
    return types.SimpleNamespace, (), dict(value.__dict__)


def _enum_member(value: EnumRecord) -> _Reduced:
    return operator.getitem, ((value.__dict__["value"],), 0)


def _cache_view(value: ActivationCache) -> _Reduced:
    tree = _module_tree(value.entries)
    cache = _Instance("Cache", {**cache_state(value.entries), "model": tree})
    return _Instance("CacheView", {"_cache": cache, "_envoy": None, "_path": value.path}).__reduce__()


def _module_tree(paths: Iterable[str]) -> _Instance | None:
    """The modules above what was cached, as nnsight's envoys without a module: a cache is walked like the model itself.

    nnsight's own cache loses its model on the way. A negative index fails: how long a list is cannot be told from its parts.
    """
    below: dict[str, Any] = {}
    for path in paths:
        level = below
        for name in path.split("."):
            level = level.setdefault(name, {})
    return next((_envoy(name, inner, _Located(ENVOY)) for name, inner in below.items()), None)


def _envoy(path: str, below: dict[str, Any], kind: _Located) -> _Instance:
    children = {name: _envoy(f"{path}.{name}", inner, kind) for name, inner in below.items()}
    named = {f"E_{name}" if name in SERVED else name: child for name, child in children.items()}
    state = {"path": path, "_module": None, "_aliases": {}, "_children": [*children.values()], "_child_map": children}
    return _Instance(kind, {**state, **named})


def _visit(value: CachedVisit) -> _Reduced:
    return _Instance("Entry", {"output": value.output, "inputs": value.inputs}).__reduce__()


def _batch_encoding(value: Any) -> _Reduced:
    """Its own state leaves out how many sequences it holds."""
    return type(value), (value.data, value.encodings, None, False, value.n_sequences)


def _batch_feature(value: Any) -> _Reduced:
    return type(value), (value.data,)


_RULES_BY_NAME: dict[str, Callable[[Any], _Reduced]] = {
    "transformers.tokenization_utils_base.BatchEncoding": _batch_encoding,
    "transformers.feature_extraction_utils.BatchFeature": _batch_feature,
}
_RULES: dict[type, Callable[[Any], _Reduced]] = {
    Record: _record,
    EnumRecord: _enum_member,
    ActivationCache: _cache_view,
    CachedVisit: _visit,
}
