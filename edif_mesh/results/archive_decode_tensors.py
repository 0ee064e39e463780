"""Nodes -> tensors and numpy arrays over an archive's storages. Every number is checked against the bytes that are there."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edif_mesh.errors import ArchiveError
from edif_mesh.results.archive_types import (
    DTYPES,
    MAX_DIMENSIONS,
    MAX_REPEAT,
    NUMPY_DTYPE,
    QUANTIZED,
    SMALL_BYTES,
    as_int,
    as_list,
)
from edif_mesh.results.wire_dtypes import from_wire, wire_dtype_of

_COMPRESSED = {
    "csr": torch.sparse_csr,
    "csc": torch.sparse_csc,
    "bsr": torch.sparse_bsr,
    "bsc": torch.sparse_bsc,
}
TENSOR_KINDS = ("tensor", "lazy", "coo", "quantized", *_COMPRESSED)
_MOST = 1 << 48


class Tensors:
    """Makes tensors and arrays over storages (one-dimensional uint8 tensors)."""

    def __init__(self, storages: Sequence[torch.Tensor], total_bytes: int) -> None:
        """`total_bytes` of all storages; each is asked for when it is needed."""
        self._storages = storages
        self._clean: set[tuple[int, str]] = set()
        self._taken: set[int] = set()
        self._room = 8 * total_bytes + SMALL_BYTES

    def storage(self, number: Any) -> torch.Tensor:
        """Return a storage; raises ArchiveError when there is none of that number."""
        return self._storages[as_int(number, 0, len(self._storages) - 1)]

    def take(self, number: Any) -> bytes:
        """Return a copy of a storage, once: no tree of many nodes over one storage makes the reader allocate."""
        data = self.storage(number)
        if number in self._taken:
            raise ArchiveError("Two values of the archive are made of the same bytes.")
        self._taken.add(number)
        return bytes(data.numpy())

    def tensor(self, node: dict[str, Any]) -> torch.Tensor:
        """Return the tensor of a node of one of `TENSOR_KINDS`."""
        kind = node["t"]
        made = (
            self._strided(node)
            if kind in ("tensor", "lazy")
            else self._quantized(node)
            if kind == "quantized"
            else self._sparse(node)
        )
        if node.get("p") is True:
            return torch.nn.Parameter(made, requires_grad=node.get("g") is True)
        return made.requires_grad_() if node.get("g") is True else made

    def _strided(self, node: dict[str, Any]) -> torch.Tensor:
        storage = self.storage(node["s"])
        layout = layout_of(node, storage.numel())
        own, dtype = layout.own, layout.dtype
        if layout.amount and dtype is torch.bool:
            self._check_bools(node["s"])
        tensor = layout.over(storage)
        if dtype is not own:
            self._make_room(layout.amount * max(own.itemsize, 8 if dtype is torch.int8 else 0))
            return from_wire(tensor, node, own)
        if node["t"] == "tensor":
            return tensor
        conjugate, negative = node.get("j") is True, node.get("n") is True
        if (conjugate and not dtype.is_complex) or (negative and not (dtype.is_complex or dtype.is_floating_point)):
            raise ArchiveError("A tensor is conjugate or negative that cannot be.")
        tensor = tensor.conj() if conjugate else tensor
        return torch._neg_view(tensor) if negative else tensor

    def _part(self, node: Any) -> torch.Tensor:
        """A tensor that another is made of: strided and nothing else."""
        if not isinstance(node, dict) or node.get("t") not in ("tensor", "lazy"):
            raise ArchiveError("A part of a tensor is no plain tensor.")
        return self.tensor(node)

    def _check_bools(self, number: int) -> None:
        if (number, "bool") not in self._clean:
            if not bool((self._storages[number] <= 1).all()):
                raise ArchiveError("A tensor of bool holds bytes that are neither 0 nor 1.")
            self._clean.add((number, "bool"))

    def _check_text(self, number: int, order: str) -> None:
        if (number, order) not in self._clean:
            if bool((self._storages[number].numpy().view(f"{order}u4") > sys.maxunicode).any()):
                raise ArchiveError("A numpy array of text holds what is no character.")
            self._clean.add((number, order))

    def _make_room(self, size: int) -> None:
        """Count what torch is about to copy: a storage may be named by many nodes, and a stride may repeat it."""
        self._room -= size
        if self._room < 0:
            raise ArchiveError("The archive's tensors would take more memory than it has bytes.")

    def _sparse(self, node: dict[str, Any]) -> torch.Tensor:
        parts, shape = [self._part(part) for part in as_list(node["parts"])], _shape(node["shape"])
        if node["t"] == "coo":
            indices, values = parts
            coalesced = node.get("k") is True
            return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=coalesced, check_invariants=True)
        compressed, plain, values = parts
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_compressed_tensor(
                compressed, plain, values, shape, layout=_COMPRESSED[node["t"]], check_invariants=True
            )

    def _quantized(self, node: dict[str, Any]) -> torch.Tensor:
        """The integers may be anything; scales and zero points must fit them, for kernels trust these."""
        whole, dtype = self._part(node["v"]), QUANTIZED[str(node["d"])]
        if whole.dtype is not dtype:
            raise ArchiveError("A quantized tensor has integers of another kind.")
        self._make_room(whole.numel() * whole.element_size())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if "parts" not in node:
                low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
                zero = as_int(node["zero"], low, high)
                return torch._make_per_tensor_quantized_tensor(whole, _scale(node["scale"]), zero)
            scales, zeros = (self._part(part) for part in as_list(node["parts"]))
            axis = as_int(node["axis"], 0, whole.dim() - 1)
            fits = scales.shape == zeros.shape == (whole.shape[axis],)
            if not fits or scales.dtype is not torch.float64 or zeros.dtype is not torch.int64:
                raise ArchiveError("A quantized tensor's scales do not fit it.")
            return torch._make_per_channel_quantized_tensor(whole, scales, zeros, axis)

    def numpy(self, node: dict[str, Any]) -> Any:
        """Return the array of a node; of no dimension for a scalar."""
        import numpy as np

        name = node["d"]
        if not isinstance(name, str) or not NUMPY_DTYPE.fullmatch(name):
            raise ArchiveError(f"numpy data of type {str(name)[:40]!r} cannot be in an archive.")
        dtype, raw, shape = np.dtype(name), self.storage(node["s"]).numpy(), _shape(node["shape"])
        if math.prod(shape) * dtype.itemsize != raw.nbytes:
            raise ArchiveError("A numpy array does not fit its bytes.")
        if dtype.kind == "b":
            self._check_bools(node["s"])
        if dtype.kind == "U":
            self._check_text(node["s"], dtype.byteorder)
        order: Any = "F" if node["t"] == "ndarray_by_column" else "C"
        return raw.view(dtype).reshape(shape, order=order) if raw.nbytes else np.empty(shape, dtype)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a strided tensor lies in its storage; offset and strides in elements of `dtype`."""

    own: torch.dtype
    dtype: torch.dtype
    """In which it was sent: its own, or a wire dtype."""
    shape: list[int]
    stride: list[int]
    offset: int

    @property
    def amount(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def over(self, storage: torch.Tensor) -> torch.Tensor:
        """Return the tensor over its storage, uint8 of one dimension, on any device."""
        if not self.amount:
            return torch.empty(0, dtype=self.dtype).as_strided(self.shape, self.stride)
        typed = storage[: storage.numel() // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        return torch.as_strided(typed, self.shape, self.stride, self.offset)


def layout_of(node: dict[str, Any], storage_bytes: int) -> Layout:
    """Return where the tensor of a strided node lies in a storage of so many bytes; raises ArchiveError."""
    own = DTYPES[str(node["d"])]
    dtype = wire_dtype_of(node, own) or own
    shape, offset = _shape(node["shape"]), as_int(node["o"], 0, _MOST)
    stride = [as_int(n, 0, _MOST) for n in as_list(node["stride"])]
    if len(shape) != len(stride):
        raise ArchiveError("A tensor's shape and strides do not fit each other.")
    layout = Layout(own, dtype, shape, stride, offset)
    if layout.amount:
        if offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) >= storage_bytes // dtype.itemsize:
            raise ArchiveError("A tensor reaches beyond its storage.")
        if layout.amount * dtype.itemsize > max(SMALL_BYTES, MAX_REPEAT * storage_bytes):
            raise ArchiveError("A tensor repeats its storage too often.")
    return layout


def _shape(value: Any) -> list[int]:
    shape = [as_int(n, 0, _MOST) for n in as_list(value)]
    if len(shape) > MAX_DIMENSIONS:
        raise ArchiveError(f"A tensor or array has more than {MAX_DIMENSIONS} dimensions.")
    return shape


def _scale(value: Any) -> float:
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise ArchiveError("A quantized tensor has no scale.")
    return float(value)
