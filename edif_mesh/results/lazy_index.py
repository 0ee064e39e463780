"""From an index expression to the bytes of a storage that it touches: torch's own rules, tried on tensors without data."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

Ranges = list[tuple[int, int]]
"""Bytes, from and up to; in order, and apart from each other."""
Index = tuple[Any, ...]
"""Of None, `...`, integers, slices, truths and tensors (int64 or bool)."""
_MAX_RUNS = 1 << 20
_MAX_PARTS = 100_000


def normal(index: Any) -> Index:
    """Return an index in its one form, with which bytes are chosen and the tensor is made; raises IndexError."""
    return tuple(_part(part) for part in (index if isinstance(index, tuple) else (index,)))


def _part(part: Any) -> Any:
    if part is None or part is ... or isinstance(part, slice | bool | int):
        return part
    if isinstance(part, np.integer):
        return operator.index(part)
    try:
        tensor = torch.as_tensor(part).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise IndexError(f"A tensor cannot be indexed with {type(part).__name__} {str(part)[:60]}: {error}") from error
    if not tensor.numel() and not isinstance(part, torch.Tensor):
        return tensor.long()
    if tensor.dtype is torch.uint8:  # torch takes it for a mask
        tensor = tensor.bool()
    if tensor.is_floating_point() or tensor.is_complex():
        raise IndexError("Tensors that are used as indices must be of whole numbers or bool.")
    if not tensor.dim():
        return tensor.item()
    return tensor if tensor.dtype is torch.bool else tensor.long()


def touched(index: Index, shell: torch.Tensor, start: int) -> Ranges:
    """Return what `index` touches of a storage that begins at the byte `start`; `shell` is the tensor on `meta`.

    It may be more than needed where lists and masks meet each other, never less. Raises IndexError as torch does.
    """
    found: Ranges = []
    for part in _basic(index, shell):
        view = shell[part]
        if view.numel():
            found += _runs(view, shell.dtype.itemsize, start)
    return merged(found)


def _basic(index: Index, shell: torch.Tensor) -> Iterator[Any]:
    """An index as indices of integers and slices that together touch the same: lists and tensors one row at a time."""
    if not any(isinstance(part, bool | torch.Tensor) for part in index):
        yield index
        return
    if any(isinstance(part, bool) for part in index) or sum(part is ... for part in index) > 1:
        yield ...
        return
    rows: list[list[Any]] = []
    for part in _spread(index, shell.dim()):
        dimension = len(rows)
        if part is None:
            continue
        if isinstance(part, int | slice):
            rows.append([part])
        elif part.dtype is torch.bool:
            if part.shape != shell.shape[dimension : dimension + part.dim()]:
                raise IndexError(
                    f"The mask of shape {tuple(part.shape)} does not fit a tensor of {tuple(shell.shape)}."
                )
            rows += [axis.unique().tolist() for axis in part.nonzero(as_tuple=True)]
        else:
            length = shell.shape[dimension] if dimension < shell.dim() else 0
            numbers = part.unique().tolist()
            if numbers and not -length <= numbers[0] <= numbers[-1] < length:
                raise IndexError(
                    f"An index of {numbers[0]} to {numbers[-1]} is out of range for a dimension of {length}."
                )
            rows.append(sorted({number % length for number in numbers}))
    if math.prod(len(row) for row in rows) > _MAX_PARTS:
        yield ...
        return
    yield from itertools.product(*rows)


def _spread(index: Index, dimensions: int) -> list[Any]:
    """The index with its `...` written out."""
    place = next((number for number, part in enumerate(index) if part is ...), None)
    if place is None:
        return list(index)
    used = sum(
        part.dim() if isinstance(part, torch.Tensor) and part.dtype is torch.bool else 1
        for part in index
        if part is not None and part is not ...
    )
    return [*index[:place], *[slice(None)] * (dimensions - used), *index[place + 1 :]]


def _runs(view: torch.Tensor, size: int, start: int) -> Ranges:
    """The contiguous bytes of a view of numbers of `size` bytes, in a storage that begins at the byte `start`."""
    axes = sorted(((stride, length) for stride, length in zip(view.stride(), view.shape, strict=True) if length > 1))
    run = 1
    while axes and axes[0][0] <= run:
        stride, length = axes.pop(0)
        run += stride * (length - 1)
    offset = view.storage_offset()
    reach = sum(stride * (length - 1) for stride, length in axes)
    if math.prod(length for _, length in axes) > _MAX_RUNS:
        return [(start + offset * size, start + (offset + reach + run) * size)]
    starts: np.ndarray[Any, np.dtype[np.int64]] = np.zeros(1, np.int64)
    for stride, length in reversed(axes):
        starts = (starts[:, None] + np.arange(length, dtype=np.int64)[None] * stride).reshape(-1)
    return [(start + (offset + int(at)) * size, start + (offset + int(at) + run) * size) for at in starts]


def merged(ranges: Ranges) -> Ranges:
    """Return the ranges in order; those that overlap or touch, as one."""
    together: Ranges = []
    for start, stop in sorted(ranges):
        if together and start <= together[-1][1]:
            together[-1] = together[-1][0], max(stop, together[-1][1])
        else:
            together.append((start, stop))
    return together
