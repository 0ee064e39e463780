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
from edif_mesh.results.lazy_tensor import LazyTensor
from edif_mesh.results.nnsight_types import ActivationCache

MAX_LEAVES = 1_000_000
MAX_EXPORT_BYTES = 1 << 40


def to_safetensors(values: Mapping[str, Any], path: Path) -> list[str]:
    """Write the tensors in `values` to `path`; return the names of the leaves that safetensors cannot hold.

    Containers are flattened: `acts[3]["mlp"]` becomes `acts.3.mlp`. What is left out stands in the file's metadata under
    `left_out` as a JSON list.

    Raises ResultError when there is no tensor at all, two leaves get the same name, or the dense tensors pass a limit.
    """
    tensors: dict[str, torch.Tensor | LazyTensor] = {}
    left_out: list[str] = []
    size = 0
    for number, (name, leaf) in enumerate(leaves(values)):
        tensor = _held(leaf)
        size += 0 if tensor is None else tensor.numel() * tensor.dtype.itemsize
        if number >= MAX_LEAVES or size > MAX_EXPORT_BYTES:
            raise ResultError("The result has too many parts for one safetensors file; fetch it as it is.")
        if tensor is None:
            left_out.append(name)
        elif name in tensors:
            raise ResultError(f"Two saved tensors would both be called {name!r} in the file; fetch it as it is.")
        else:
            tensors[name] = tensor
    if not tensors:
        raise ResultError("The result holds no tensor, so there is nothing to write as safetensors.")
    _write(tensors, path, {"format": "pt", "left_out": json.dumps(left_out)})
    return left_out


def _write(tensors: Mapping[str, torch.Tensor | LazyTensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file a piece at a time: the library's own writer holds all of it in memory, as bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _HELD[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in _pieces(tensor):
                file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy())


def _pieces(tensor: torch.Tensor | LazyTensor) -> Iterator[torch.Tensor]:
    """A tensor in rows that together take some MB, so that only these are in memory, or copied where it is not contiguous."""
    if not tensor.numel():
        return
    if isinstance(tensor, LazyTensor):
        tensor.fetch()
    size = tensor.numel() * tensor.dtype.itemsize
    if not tensor.ndim or size <= _PIECE_BYTES:
        yield tensor[...].detach()
        return
    rows = max(1, _PIECE_BYTES * tensor.shape[0] // size)
    for first in range(0, tensor.shape[0], rows):
        yield tensor[first : first + rows].detach()


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


_PIECE_BYTES = 4 << 20
_HELD = {
    DTYPES[name]: told
    for name, told in (
        pair.split(":")
        for pair in (
            "float64:F64 float32:F32 float16:F16 bfloat16:BF16 float8_e4m3fn:F8_E4M3 float8_e5m2:F8_E5M2 "
            "float8_e4m3fnuz:F8_E4M3FNUZ float8_e5m2fnuz:F8_E5M2FNUZ complex64:C64 int64:I64 int32:I32 int16:I16 "
            "int8:I8 uint64:U64 uint32:U32 uint16:U16 uint8:U8 bool:BOOL"
        ).split()
    )
}
"""The dtypes that every release of safetensors holds that this one is tested with, and its names for them."""


def holds(leaf: Any) -> bool:
    """Return whether safetensors can hold a leaf; fetches nothing."""
    return isinstance(_held(leaf), torch.Tensor | LazyTensor)


def _held(leaf: Any) -> torch.Tensor | LazyTensor | None:
    """The leaf as a tensor that safetensors can hold, else None."""
    if isinstance(leaf, LazyTensor):
        return leaf if leaf.dtype in _HELD else None
    if isinstance(leaf, torch.Tensor):
        fits = leaf.layout is torch.strided and not leaf.is_quantized and leaf.dtype in _HELD
        return leaf.detach().resolve_conj().resolve_neg() if fits else None
    if type(leaf).__module__ == "numpy" and hasattr(leaf, "dtype") and leaf.dtype.kind in "biuf":
        try:
            return torch.as_tensor(leaf)
        except (TypeError, ValueError):
            return None
    return None


def as_numpy(leaf: Any) -> Any:
    """Return a tensor as a numpy array: sparse and quantized ones dense, floats that numpy lacks as float32, bits as bytes."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    leaf = leaf.detach().dequantize() if leaf.is_quantized else leaf.detach()
    leaf = (leaf if leaf.layout is torch.strided else leaf.to_dense()).resolve_conj().resolve_neg()
    if leaf.dtype is torch.complex32:
        leaf = leaf.to(torch.complex64)
    try:
        return leaf.numpy()
    except TypeError:
        pass
    try:
        return leaf.float().numpy()
    except (RuntimeError, NotImplementedError):  # several numbers in a byte
        return leaf.view(torch.uint8).numpy()
