"""Saved values as a safetensors file: every tensor under its dotted name, the rest listed in the metadata."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from edif_mesh.errors import ResultError
from edif_mesh.results.archive_types import CACHES, DTYPES, Record
from edif_mesh.results.nnsight_types import ActivationCache

MAX_LEAVES = 1_000_000
MAX_EXPORT_BYTES = 1 << 40


def to_safetensors(values: Mapping[str, Any], path: Path) -> list[str]:
    """Write the tensors in `values` to `path`; return the names of the leaves that safetensors cannot hold.

    Containers are flattened: `acts[3]["mlp"]` becomes `acts.3.mlp`. What is left out stands in the file's metadata under
    `left_out` as a JSON list.

    Raises ResultError when there is no tensor at all, two leaves get the same name, or the dense tensors pass a limit.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    left_out: list[str] = []
    size = 0
    for number, (name, leaf) in enumerate(leaves(values)):
        tensor = _dense(leaf)
        size += 0 if tensor is None else tensor.numel() * tensor.element_size()
        if number >= MAX_LEAVES or size > MAX_EXPORT_BYTES:
            raise ResultError("The result has too many parts for one safetensors file; fetch it as it is.")
        if tensor is None:
            left_out.append(name)
        elif name in tensors:
            raise ResultError(f"Two saved tensors would both be called {name!r} in the file; fetch it as it is.")
        else:
            tensors[name] = tensor.contiguous()
    if not tensors:
        raise ResultError("The result holds no tensor, so there is nothing to write as safetensors.")
    _separate(tensors)
    save_file(tensors, str(path), metadata={"format": "pt", "left_out": json.dumps(left_out)})
    return left_out


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted name, leaf)` for everything in nested containers; empty containers are leaves."""
    parts = _parts(value)
    if not parts:
        yield name, value
        return
    for key, part in parts:
        yield from leaves(part, f"{name}.{key}" if name else str(key))


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """The named parts of a container, else nothing."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple | deque) and not isinstance(value, torch.Size):
        return list(enumerate(value))
    if isinstance(value, SimpleNamespace):
        return list(vars(value).items())
    if isinstance(value, Record):
        return [(key, part) for key, part in vars(value).items() if key != "type_name"]
    if isinstance(value, ActivationCache):
        return list(value.entries.items())
    if type(value).__name__ == "CacheView":
        return list(object.__getattribute__(value, "_cache").entries.items())
    if type(value).__name__ == "EncoderDecoderCache":
        return [("self", value.self_attention_cache), ("cross", value.cross_attention_cache)]
    if type(value).__name__ in CACHES:
        return [
            (i, {k: v for k, v in vars(c).items() if k in ("keys", "values") or isinstance(v, dict)})
            for i, c in enumerate(value.layers)
        ]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return []


_HELD = {
    DTYPES[name]
    for name in (
        "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz complex64 "
        "int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
    ).split()
}
"""The dtypes that every release of safetensors holds that this one is tested with."""


def _dense(leaf: Any) -> torch.Tensor | None:
    """The leaf as a tensor that safetensors can hold, else None."""
    if isinstance(leaf, torch.Tensor):
        fits = leaf.layout is torch.strided and not leaf.is_quantized and leaf.dtype in _HELD
        return leaf.detach().resolve_conj().resolve_neg() if fits else None
    if type(leaf).__module__ == "numpy" and hasattr(leaf, "dtype") and leaf.dtype.kind in "biuf":
        try:
            return torch.as_tensor(leaf)
        except (TypeError, ValueError):
            return None
    return None


def _separate(tensors: dict[str, torch.Tensor]) -> None:
    """safetensors refuses tensors that share memory: give every later one its own."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        where = tensor.untyped_storage().data_ptr()
        if where and where in seen:
            tensors[name] = tensor.clone()
        seen.add(where)
