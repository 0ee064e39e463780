"""Tensors and numpy arrays -> nodes, by layout and dtype. Looks at data only where the walk ships it."""

from __future__ import annotations

import math
from typing import Any

import torch

from edif_mesh.errors import UnsupportedValueError
from edif_mesh.results.archive_refusals import GENERIC, way_out
from edif_mesh.results.archive_types import NAMES, NUMPY_DTYPE, NUMPY_KINDS, QUANTIZED, Node, Walk

_COMPRESSED = {
    torch.sparse_csr: "csr",
    torch.sparse_csc: "csc",
    torch.sparse_bsr: "bsr",
    torch.sparse_bsc: "bsc",
}


def is_plain_tensor(value: Any) -> bool:
    """Whether `value` is a tensor that an archive holds without a question: a dense one of a usual dtype on a real device."""
    return (
        type(value) is torch.Tensor
        and value.dtype in NAMES
        and value.layout is torch.strided
        and not value.is_meta
        and not value.is_nested
    )


def tensor_node(walk: Walk, value: torch.Tensor, path: str) -> Node:
    """Encode a tensor; raises UnsupportedValueError for a layout, dtype or subclass that no archive holds."""
    kind = type(value)
    if kind not in (torch.Tensor, torch.nn.Parameter):
        hint = way_out(value, kind)
        if hint == GENERIC:
            hint = "Save .as_subclass(torch.Tensor) of it, or its .dequantize()."
        raise UnsupportedValueError(path, f"tensor subclass {kind.__name__}", hint)
    extra: dict[str, Any] = {"g": True} if value.requires_grad else {}
    if kind is torch.nn.Parameter:
        extra["p"] = True
    if value.device.type == "meta":
        raise UnsupportedValueError(path, "tensor without data (meta)", "Save its .shape instead.")
    tensor = value.detach()
    if value.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
        extra |= {"k": True} if tensor.is_coalesced() else {}
        return {"t": "coo", **_parts(walk, parts, tensor, path), **extra}
    if value.layout in _COMPRESSED:
        return {"t": _COMPRESSED[value.layout], **_parts(walk, _compressed(tensor), tensor, path), **extra}
    if value.is_nested:
        raise UnsupportedValueError(path, "nested tensor", "Save list(....unbind()) of it.")
    if value.layout is not torch.strided:
        raise UnsupportedValueError(path, f"{value.layout} tensor", "Save its .to_dense() instead.")
    if value.is_quantized:
        return _quantized(walk, tensor, path, extra)
    if value.dtype not in NAMES:
        raise UnsupportedValueError(path, f"tensor of {value.dtype}", "Save .float() or .to(torch.int8) of it.")
    if tensor.is_conj():
        tensor, extra["j"] = tensor.conj(), True
    if tensor.is_neg():
        tensor, extra["n"] = torch._neg_view(tensor), True
    return walk.place(tensor, {"t": "lazy" if "j" in extra or "n" in extra else "tensor", **extra})


def _parts(walk: Walk, parts: list[torch.Tensor], tensor: torch.Tensor, path: str) -> dict[str, Any]:
    return {"parts": [tensor_node(walk, part, path) for part in parts], "shape": list(tensor.shape)}


def _compressed(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The two index tensors and the values; which dimension is compressed stands in the layout."""
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def _quantized(walk: Walk, tensor: torch.Tensor, path: str, extra: dict[str, Any]) -> Node:
    """The integers, and what makes them numbers: a scale and a zero point, or tensors of these along one axis."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in QUANTIZED:
        raise UnsupportedValueError(path, f"quantized tensor of {tensor.dtype}", "Save its .dequantize() instead.")
    whole = tensor_node(walk, walk.integers(tensor), path)
    if tensor.qscheme() is torch.per_tensor_affine and not math.isfinite(tensor.q_scale()):
        raise UnsupportedValueError(path, "tensor quantized without a finite scale", "Save its .int_repr() instead.")
    if tensor.qscheme() is torch.per_tensor_affine:
        scale = {"scale": tensor.q_scale(), "zero": tensor.q_zero_point()}
        return {"t": "quantized", "d": name, "v": whole, **scale, **extra}
    parts = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
    if parts[1].is_floating_point():
        raise UnsupportedValueError(path, "tensor quantized by float zero points", "Save its .dequantize() instead.")
    per_channel = {"parts": [tensor_node(walk, part, path) for part in parts], "axis": tensor.q_per_channel_axis()}
    return {"t": "quantized", "d": name, "v": whole, **per_channel, **extra}


def numpy_node(walk: Walk, value: Any, path: str) -> Node:
    """Encode a numpy array or scalar; raises UnsupportedValueError for objects, structures and subclasses."""
    import numpy as np

    kind = type(value)
    is_array = kind in (np.ndarray, np.memmap)
    if not is_array and not isinstance(value, np.generic):
        hint = way_out(value, kind)
        raise UnsupportedValueError(path, f"numpy {kind.__name__}", hint)
    dtype = value.dtype
    if dtype.kind == "V":
        raise UnsupportedValueError(path, f"numpy {kind.__name__} with fields", "Save its fields one by one.")
    if dtype.kind in "SU" and not dtype.itemsize:  # the empty text
        dtype = np.dtype(f"{dtype.kind}1")
    if dtype.kind not in NUMPY_KINDS or not NUMPY_DTYPE.fullmatch(dtype.str):
        raise UnsupportedValueError(path, f"numpy {kind.__name__} of {dtype}", "Save its .tolist() instead.")
    by_column = is_array and value.flags.f_contiguous and not value.flags.c_contiguous

    def data() -> memoryview:
        array = np.ascontiguousarray(value.T if by_column else value, dtype)
        flat: Any = array.reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)
        if dtype.kind == "b" and array.nbytes and flat.max() > 1:
            flat = (flat != 0).view(np.uint8)  # a reader takes only 0 and 1
        return memoryview(flat) if array.nbytes else memoryview(b"")

    name = "ndarray_by_column" if by_column else "ndarray" if is_array else "npscalar"
    return {"t": name, "d": dtype.str, "shape": list(value.shape), "s": walk.add(data, dtype.itemsize)}
