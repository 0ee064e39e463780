"""Tensors in a shorter dtype on their way: rounded by the site, given back in their own dtype, with a stated bound."""

from __future__ import annotations

import math
from typing import Any

import torch

from edif_mesh.errors import ArchiveError

WIRE_DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
LEAST_ELEMENTS = 64
"""Fewer numbers are sent as they are: a loss or a score stays exact."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_STEPS = 127
_WORST_PART = 1 / 8
"""Hidden states of language models have a few huge numbers: of those of SmolLM2's middle layers 99.9 % would become 0."""


def to_wire(tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, dict[str, Any]] | None:
    """Return the tensor in the wire dtype `name` and what its node says of it; None where it is sent as it is.

    `int8` is linear over the largest magnitude: node fields `scale`, and `bound`, the largest absolute error. Where a few numbers
    are so large that half a step is more than `_WORST_PART` of the mean magnitude, `bfloat16` takes its place. As they
    are: what would not become shorter, has fewer than `LEAST_ELEMENTS` numbers, or holds what the wire dtype cannot
    (NaN in `int8`, too large for `float16`).
    """
    wire = WIRE_DTYPES[name]
    if tensor.dtype not in _FLOATS or tensor.numel() < LEAST_ELEMENTS or wire.itemsize >= tensor.element_size():
        return None
    if wire is not torch.int8:
        short = tensor.to(wire)
        return (short, {"w": name}) if bool((torch.isfinite(short) == torch.isfinite(tensor)).all()) else None
    largest = float(tensor.abs().max())
    if not math.isfinite(largest):
        return None
    scale = largest / _STEPS or 1.0
    usual = float(torch.linalg.vector_norm(tensor, 1, dtype=torch.float64)) / tensor.numel()
    if largest and scale / 2 > _WORST_PART * usual:
        return to_wire(tensor, "bfloat16")
    exact = tensor.double() if tensor.dtype is torch.float64 else tensor.float()
    short = (exact / scale).round_().clamp_(-_STEPS, _STEPS).to(torch.int8)
    node = {"w": name, "scale": scale}
    bound = float((from_wire(short, node, tensor.dtype).double() - tensor.double()).abs().max())
    return short, {**node, "bound": bound}


def wire_dtype_of(node: dict[str, Any], dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which a node's tensor of `dtype` was sent, None when it was its own; raises ArchiveError."""
    if "w" not in node:
        return None
    wire = WIRE_DTYPES.get(str(node["w"]))
    if wire is None or dtype not in _FLOATS or node["t"] != "tensor":
        raise ArchiveError(f"A tensor was sent as {str(node['w'])[:40]!r}, which cannot be.")
    if wire is torch.int8 and not (isinstance(node.get("scale"), float | int) and math.isfinite(node["scale"])):
        raise ArchiveError("A tensor was sent as int8 without a scale.")
    return wire


def from_wire(short: torch.Tensor, node: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in its own dtype; `node` was checked by `wire_dtype_of`."""
    if short.dtype is torch.int8:
        return (short.double() * float(node["scale"])).to(dtype)
    return short.to(dtype)
