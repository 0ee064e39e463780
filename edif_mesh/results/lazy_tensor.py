"""A saved tensor whose bytes come when they are asked for: what is indexed is fetched, and no more than its chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from edif_mesh.errors import ArchiveError, ResultError
from edif_mesh.results.archive_decode_tensors import Layout
from edif_mesh.results.wire_dtypes import from_wire

_MAX_RUNS = 1 << 20
_Runs = list[tuple[int, int]]


class Pieces(Protocol):
    """An archive of which parts are here."""

    view: memoryview
    """All of it, zeros where nothing has come yet."""

    async def need(self, ranges: _Runs) -> None:
        """Return once the bytes in these ranges (start, stop) are in `view`; raises ResultError, TransportError."""

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for `need` from code that is not asynchronous; raises ResultError where that cannot be."""


class LazyTensor:
    """Shape and dtype at once; `t[...]` as torch has it, over the bytes that are needed for it.

    Every index gives a real tensor of its own. In asynchronous code: `await t.at(...)`.
    """

    def __init__(self, pieces: Pieces, layout: Layout, node: dict[str, Any], start: int, size: int) -> None:
        """`start` and `size` of the storage in the archive, in bytes."""
        self._pieces, self._layout, self._node = pieces, layout, node
        self._start, self._size = start, size
        self.shape = torch.Size(layout.shape)
        self.dtype = layout.own
        self.requires_grad = node.get("g") is True

    @property
    def ndim(self) -> int:
        """How many dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in its own dtype."""
        return int(math.prod(self.shape) * self.dtype.itemsize)

    def numel(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without dimensions")
        return int(self.shape[0])

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[number] for number in range(len(self)))

    def __repr__(self) -> str:
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype}, {self.nbytes:,} bytes, fetched when indexed)"

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Fetch what `index` needs and return it; raises IndexError as torch does, ResultError, TransportError."""
        self._pieces.run(self._pieces.need(self._ranges(index)))
        return self._made(index)

    async def at(self, *index: Any) -> torch.Tensor:
        """`await t.at(slice(None), -1)` is `t[:, -1]` for asynchronous code."""
        await self._pieces.need(self._ranges(index))
        return self._made(index)

    def load(self) -> torch.Tensor:
        """Return all of it, in memory of its own."""
        return self[...]

    def mapped(self) -> torch.Tensor:
        """Return all of it, over the file in which it lies: for what is larger than memory. Not to be changed in place.

        A tensor that was sent in a wire dtype is made anew, in memory.
        """
        self._pieces.run(self._pieces.need(self._ranges(...)))
        tensor = self._whole()
        return tensor if self._layout.dtype is self.dtype else from_wire(tensor, self._node, self.dtype)

    def numpy(self) -> Any:
        """Return all of it as a numpy array; bfloat16 as float32, for numpy has none."""
        tensor = self.load()
        return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy().astype(dtype, copy=False) if dtype is not None else self.numpy()

    # ------------------------------------------------------------------------------------------------------ inside

    def _whole(self) -> torch.Tensor:
        if not self._size:
            return self._layout.over(torch.empty(0, dtype=torch.uint8))
        raw = torch.frombuffer(self._pieces.view, dtype=torch.uint8, count=self._size, offset=self._start)
        return self._layout.over(raw)

    def _made(self, index: Any) -> torch.Tensor:
        tensor = self._whole()[index].clone()
        if tensor.dtype is torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise ArchiveError("A tensor of bool holds bytes that are neither 0 nor 1.")
        if self._layout.dtype is not self.dtype:
            tensor = from_wire(tensor, self._node, self.dtype)
        return tensor.requires_grad_() if self.requires_grad else tensor

    def _ranges(self, index: Any) -> _Runs:
        """The bytes of the archive that `index` touches, merged; tried on a tensor without data first."""
        if not self._size or not self.numel():
            return []
        shell = self._layout.over(torch.empty(self._size, dtype=torch.uint8, device="meta"))
        size = self._layout.dtype.itemsize
        found: list[tuple[int, int]] = []
        for part in _basic(index, shell):
            view = shell[part]
            if view.numel():
                found += _runs(view, size, self._start)
        return _merged(found)


def _basic(index: Any, shell: torch.Tensor) -> Iterator[Any]:
    """An index as indices of integers and slices that together touch the same: lists and tensors one row at a time."""
    given = index if isinstance(index, tuple) else (index,)
    if all(
        part is None or part is ... or (isinstance(part, int | slice) and not isinstance(part, bool)) for part in given
    ):
        yield index
        return
    if any(isinstance(part, bool) for part in given):
        yield ...
        return
    spread = _spread(given, shell.dim())
    if spread is None:
        yield ...
        return
    rows: list[list[Any]] = []
    dimension = 0
    for part in spread:
        if part is None:
            continue
        if isinstance(part, int | slice):
            rows.append([part])
            dimension += 1
            continue
        wanted = torch.as_tensor(part).cpu()
        if wanted.dtype is torch.bool:
            if wanted.shape != shell.shape[dimension : dimension + wanted.dim()]:
                raise IndexError(
                    f"The mask of shape {tuple(wanted.shape)} does not fit a tensor of {tuple(shell.shape)}."
                )
            rows += [sorted(set(axis.tolist())) for axis in wanted.nonzero(as_tuple=True)]
            dimension += wanted.dim()
            continue
        length = shell.shape[dimension]
        numbers = sorted({int(number) for number in wanted.reshape(-1).tolist()})
        if numbers and not -length <= numbers[0] <= numbers[-1] < length:
            raise IndexError(f"An index of {numbers[0]} to {numbers[-1]} is out of range for a dimension of {length}.")
        rows.append(sorted({number % length for number in numbers}))
        dimension += 1
    if math.prod(len(row) for row in rows) > 100_000:
        yield ...
        return
    yield from itertools.product(*rows)


def _spread(given: tuple[Any, ...], dimensions: int) -> list[Any] | None:
    """The index with its `...` written out; None when it has two."""
    places = [number for number, part in enumerate(given) if part is ...]
    if len(places) > 1:
        return None
    if not places:
        return list(given)
    used = sum(
        torch.as_tensor(part).dim()
        if not isinstance(part, int | slice) and torch.as_tensor(part).dtype is torch.bool
        else 1
        for part in given
        if part is not None and part is not ...
    )
    return [*given[: places[0]], *[slice(None)] * (dimensions - used), *given[places[0] + 1 :]]


def _runs(view: torch.Tensor, size: int, start: int) -> list[tuple[int, int]]:
    """The contiguous bytes of a view of numbers of `size` bytes, in a storage that begins at `start` of the archive."""
    axes = sorted(((stride, length) for stride, length in zip(view.stride(), view.shape, strict=True) if length > 1))
    run = 1
    while axes and axes[0][0] <= run:
        stride, length = axes.pop(0)
        run = max(run, stride * (length - 1) + run) if stride else run
    offset = view.storage_offset()
    reach = sum(stride * (length - 1) for stride, length in axes)
    if math.prod(length for _, length in axes) > _MAX_RUNS:
        return [(start + offset * size, start + (offset + reach + run) * size)]
    starts: np.ndarray[Any, np.dtype[np.int64]] = np.zeros(1, np.int64)
    for stride, length in reversed(axes):
        starts = (starts[:, None] + np.arange(length, dtype=np.int64)[None] * stride).reshape(-1)
    return [(start + (offset + int(at)) * size, start + (offset + int(at) + run) * size) for at in starts]


def _merged(ranges: list[tuple[int, int]]) -> _Runs:
    merged: _Runs = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def no_waiting(work: Coroutine[Any, Any, None]) -> None:
    """`Pieces.run` of a result that was opened in asynchronous code."""
    work.close()
    raise ResultError(
        "This result was opened in asynchronous code: write `await result['name'].at(...)`, or use BlockingMesh."
    )


Run = Callable[[Coroutine[Any, Any, None]], None]
