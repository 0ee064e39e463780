"""Any index on a lazy tensor gives what torch gives, from the bytes that were asked for and no others."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edif_mesh.results.archive_decode_tensors import layout_of
from edif_mesh.results.lazy_tensor import LazyTensor
from tests.same_values import assert_same

START = 192
BASES = [torch.arange(1, 361).to(dtype) for dtype in (torch.float32, torch.int16, torch.complex64)]


class Guarded:
    """An archive that holds 0xEE wherever nobody has asked."""

    def __init__(self, storage: torch.Tensor) -> None:
        self._all = bytes(START) + storage.numpy().tobytes() + bytes(64)
        self.view = memoryview(bytearray(b"\xee" * len(self._all)))
        self.moved_bytes = 0

    async def need(self, ranges: list[tuple[int, int]]) -> None:
        reached = START
        for start, stop in ranges:
            assert reached <= start < stop <= len(self._all) - 64, "in order, apart, within the storage"
            self.view[start:stop] = self._all[start:stop]
            self.moved_bytes += stop - start
            reached = stop

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run(work)


def lazy_over(tensor: torch.Tensor, storage: torch.Tensor) -> tuple[LazyTensor, Guarded]:
    node = {
        "t": "tensor", "d": str(tensor.dtype).removeprefix("torch."), "s": 0, "shape": list(tensor.shape),
        "stride": list(tensor.stride()), "o": tensor.storage_offset(),
    }  # fmt: skip
    size = storage.numel() * storage.element_size()
    pieces = Guarded(storage)
    return LazyTensor(pieces, layout_of(node, size), node, START, size), pieces


@st.composite
def tensors(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    base = draw(st.sampled_from(BASES))
    shape = draw(st.sampled_from([(360,), (12, 30), (4, 9, 10), (2, 3, 6, 10), (360, 1), (1, 1, 360)]))
    view = base.reshape(shape)
    view = view.permute(*draw(st.permutations(range(len(shape)))))
    cuts = tuple(slice(draw(st.integers(0, 2)), None, draw(st.integers(1, 3))) for _ in shape)
    return (view[cuts] if draw(st.booleans()) else view), base


@st.composite
def indices(draw: Any, shape: tuple[int, ...]) -> Any:
    parts: list[Any] = []
    dimensions = list(shape)
    while dimensions and len(parts) < 6:
        length = dimensions.pop(0)
        some = st.integers(-length - 1, length)
        kind = draw(st.sampled_from("int slice slice list tensor uint8 numpy mask lists none rest stop".split()))
        if kind == "int":
            parts.append(draw(some))
        elif kind == "slice":
            end = st.none() | some
            parts.append(slice(draw(end), draw(end), draw(st.none() | st.integers(1, 4))))
        elif kind == "list":
            parts.append(draw(st.lists(some, max_size=4)))
        elif kind == "tensor":
            parts.append(
                torch.tensor(draw(some))
                if draw(st.booleans())
                else torch.tensor(draw(st.lists(some, min_size=1, max_size=3)))
            )
        elif kind == "numpy":
            parts.append(draw(st.sampled_from([np.int64(0), np.uint8(0), np.array([0, 0])])))
        elif kind == "lists":
            parts.append([[draw(some)], [draw(some)]])
        elif kind in ("mask", "uint8"):
            over = (length, dimensions.pop(0)) if dimensions and draw(st.booleans()) else (length,)
            mask = torch.rand(over, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.3
            parts.append(mask.to(torch.uint8) if kind == "uint8" else mask)
        elif kind == "none":
            parts.append(draw(st.sampled_from([None, True, False])))
            dimensions.insert(0, length)
        elif kind == "rest":
            parts.append(...)
            dimensions = dimensions[-draw(st.integers(0, len(dimensions))) :] if dimensions else []
        else:
            break
    return parts[0] if len(parts) == 1 and not isinstance(parts[0], list) else tuple(parts)


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_index_gives_what_torch_gives(data: st.DataObject) -> None:
    tensor, storage = data.draw(tensors())
    index = data.draw(indices(tuple(tensor.shape)))
    lazy, _pieces = lazy_over(tensor, storage)
    try:
        wanted = tensor[index]
    except (IndexError, TypeError, RuntimeError, ValueError):
        with pytest.raises((IndexError, TypeError, RuntimeError, ValueError)):
            lazy[index]
        return
    try:
        found = lazy[index]
    except IndexError:  # torch looks at no bounds where it has nothing to return
        assert not wanted.numel()
        return
    assert_same(found, wanted.clone())


@pytest.mark.parametrize(
    ("index", "numbers"),
    [
        ((3,), 30), ((slice(None), -1), 12), ((2, slice(5, 9)), 4), (([1, 5],), 60), ((slice(2, 4),), 60), ((..., 0), 12),
        ((torch.tensor([1, 5]), 7), 2), ((torch.arange(12) == 3,), 30), ((slice(0, 0),), 0), ((None, 4), 30),
    ],
)  # fmt: skip
def test_common_indices_ask_for_what_they_return(index: Any, numbers: int) -> None:
    base = BASES[0]
    lazy, pieces = lazy_over(base.reshape(12, 30), base)
    assert_same(lazy[index], base.reshape(12, 30)[index].clone())
    assert pieces.moved_bytes == 4 * numbers
