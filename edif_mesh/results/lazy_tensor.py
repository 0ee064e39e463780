"""A saved tensor whose bytes come when they are asked for: what is indexed is fetched, and no more than its chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol

import torch

from edif_mesh.errors import ArchiveError, ResultError
from edif_mesh.results.archive_decode_tensors import Layout
from edif_mesh.results.lazy_index import Index, Ranges, normal, touched
from edif_mesh.results.wire_dtypes import from_wire


class Pieces(Protocol):
    """An archive of which parts are here."""

    view: memoryview
    """All of it, zeros where nothing has come yet."""

    async def need(self, ranges: Ranges) -> None:
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
        if self.requires_grad and not (self.dtype.is_floating_point or self.dtype.is_complex):
            raise ArchiveError("A tensor of whole numbers cannot have a gradient.")

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
        wanted = normal(index)
        self._pieces.run(self._pieces.need(self._ranges(wanted)))
        return self._made(wanted)

    async def at(self, *index: Any) -> torch.Tensor:
        """`await t.at(slice(None), -1)` is `t[:, -1]` for asynchronous code."""
        wanted = normal(index)
        await self._pieces.need(self._ranges(wanted))
        return self._made(wanted)

    def load(self) -> torch.Tensor:
        """Return all of it, in memory of its own."""
        return self[...]

    def mapped(self) -> torch.Tensor:
        """Return all of it, over the file in which it lies: for what is larger than memory. Not to be changed in place.

        A tensor that was sent in a wire dtype is made anew, in memory.
        """
        self.fetch()
        tensor = self._whole()
        if tensor.dtype is torch.bool:
            _bools(tensor.view(torch.uint8))
        return tensor if self._layout.dtype is self.dtype else from_wire(tensor, self._node, self.dtype)

    def fetch(self) -> None:
        """Have all of it here, on disk; indexing then asks nobody."""
        self._pieces.run(self._pieces.need(self._ranges((...,))))

    def numpy(self) -> Any:
        """Return all of it as a numpy array; bfloat16 as float32, for numpy has none."""
        tensor = self.load().detach()
        return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy().astype(dtype, copy=False) if dtype is not None else self.numpy()

    # ------------------------------------------------------------------------------------------------------ inside

    def _whole(self) -> torch.Tensor:
        if not self._size:
            return self._layout.over(torch.empty(0, dtype=torch.uint8))
        raw = torch.frombuffer(self._pieces.view, dtype=torch.uint8, count=self._size, offset=self._start)
        return self._layout.over(raw)

    def _made(self, index: Index) -> torch.Tensor:
        tensor = self._whole()
        if tensor.dtype.itemsize == 1:  # as bytes: torch copies no four bits, and makes any byte true
            tensor = tensor.view(torch.uint8)[index].clone()
            tensor = tensor.view(self._layout.dtype) if self._layout.dtype is not torch.bool else _bools(tensor)
        else:
            tensor = tensor[index].clone()
        if self._layout.dtype is not self.dtype:
            tensor = from_wire(tensor, self._node, self.dtype)
        return tensor.requires_grad_() if self.requires_grad else tensor

    def _ranges(self, index: Index) -> Ranges:
        """The bytes of the archive that `index` touches."""
        if not self._size or not self.numel():
            return []
        return touched(index, self._layout.over(torch.empty(self._size, dtype=torch.uint8, device="meta")), self._start)


def _bools(data: torch.Tensor) -> torch.Tensor:
    if data.numel() and int(data.max()) > 1:
        raise ArchiveError("A tensor of bool holds bytes that are neither 0 nor 1.")
    return data.view(torch.bool)


def no_waiting(work: Coroutine[Any, Any, None]) -> None:
    """`Pieces.run` of a result that was opened in asynchronous code."""
    work.close()
    raise ResultError(
        "This result was opened in asynchronous code: write `await result['name'].at(...)`, or use BlockingMesh."
    )


Run = Callable[[Coroutine[Any, Any, None]], None]
