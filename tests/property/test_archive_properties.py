"""Any nesting of plain values and tensor views survives the archive, by buffer, by stream and through torch.load."""

from __future__ import annotations

import io
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edif_mesh.results.archive import StreamingReader, plan, read
from edif_mesh.results.torchfile import write_values
from tests.same_values import assert_same

KINDS = (torch.float32, torch.bfloat16, torch.int16, torch.uint8, torch.complex64, torch.float8_e5m2)
BASES = [torch.arange(120).remainder(100).to(dtype).reshape(4, 5, 6) for dtype in KINDS]

keys = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.tuples(st.integers(), st.text(max_size=3))
plain = keys | st.floats() | st.binary(max_size=40) | st.complex_numbers() | st.just(...)


@st.composite
def views(draw: Any) -> torch.Tensor:
    """A strided view of one of few bases, so that several values share a storage."""
    view = draw(st.sampled_from(BASES))
    cuts = [slice(draw(st.integers(0, 4)), draw(st.integers(0, 6)), draw(st.integers(1, 3))) for _ in range(3)]
    return view[tuple(cuts)].permute(*draw(st.permutations(range(3))))


values = st.recursive(
    plain | views(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | inner.map(lambda v: [v, v])
    ),
    max_leaves=12,
)


@settings(max_examples=120, deadline=None)
@given(saved=st.dictionaries(st.text(max_size=8), values, max_size=4), step=st.integers(1, 3000))
def test_what_is_saved_is_what_is_read(saved: dict[str, Any], step: int) -> None:
    result = plan(saved)
    data = result.to_bytes()
    assert len(data) == result.total_bytes
    assert_same(read(data), saved)
    reader = StreamingReader(limit_bytes=len(data))
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
    assert_same(reader.finish(), saved)
    out = io.BytesIO()
    write_values(read(data), out, compress=False)
    assert_same(torch.load(io.BytesIO(out.getvalue()), weights_only=False), saved)
