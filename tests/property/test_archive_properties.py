"""Any nesting of plain values and tensor views survives the archive, by buffer and through torch.load."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edif_mesh.results.archive import plan, read
from edif_mesh.results.archive_records import TAIL_BYTES, Tree, parse_tail, parse_tree
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
@given(saved=st.dictionaries(st.text(max_size=8), values, max_size=4))
def test_what_is_saved_is_what_is_read(saved: dict[str, Any]) -> None:
    result = plan(saved)
    data = result.to_bytes()
    assert len(data) == result.total_bytes
    assert_same(read(data), saved)
    out = io.BytesIO()
    write_values(read(data), out, compress=False)
    assert_same(torch.load(io.BytesIO(out.getvalue()), weights_only=False), saved)


floats = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
numbers = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-30, 65504.0, 65536.0, 3e38])


@settings(max_examples=150, deadline=None)
@given(
    some=st.lists(numbers, min_size=64, max_size=80),
    dtype=floats,
    wire=st.sampled_from(["float16", "bfloat16", "int8"]),
)
def test_a_tensor_in_a_wire_dtype_comes_back_in_its_own_within_the_bound(
    some: list[float], dtype: torch.dtype, wire: str
) -> None:
    tensor = torch.tensor(some, dtype=torch.float64).to(dtype)
    archive = plan({"t": tensor, "again": tensor, "few": tensor[:3]}, wire_dtype=wire)
    got = read(archive.to_bytes())
    assert_same(got["few"], tensor[:3])
    assert_same(got["again"], got["t"])
    assert got["t"].dtype is dtype
    finite = torch.isfinite(tensor)
    assert torch.equal(torch.isfinite(got["t"]), finite)
    assert torch.equal(got["t"][~finite].nan_to_num(), tensor[~finite].nan_to_num())
    node = tree_of(archive.to_bytes()).values[0][1]
    off = (got["t"].double() - tensor.double())[finite].abs()
    if "w" not in node:
        assert_same(got["t"], tensor)
    elif node["w"] == "int8":
        assert node["bound"] <= float(tensor.double().abs().mean()) / 7
        rounding = torch.finfo(dtype).eps * float(tensor[finite].double().abs().max()) + torch.finfo(dtype).tiny
        assert float(off.max()) <= node["bound"] <= node["scale"] * 0.5000001 + rounding
    else:
        kind = torch.finfo(getattr(torch, node["w"]))
        assert bool((off <= kind.eps * tensor[finite].double().abs() + kind.smallest_normal).all())


def tree_of(data: bytes) -> Tree:
    offset, size = parse_tail(data[-TAIL_BYTES:], len(data))
    return parse_tree(data[offset : offset + size], offset - 64)


def test_a_few_huge_numbers_do_not_turn_all_others_into_zeros() -> None:
    hidden = torch.randn(100, 576)
    hidden[0, 17] = 24_761.0  # as in a middle layer of SmolLM2
    back = read(plan({"h": hidden, "half": hidden.bfloat16()}, wire_dtype="int8").to_bytes())
    assert torch.equal(back["h"], hidden.bfloat16().float())
    assert torch.equal(back["half"], hidden.bfloat16())


@pytest.mark.parametrize("wire", ["float16", "int8"])
def test_views_that_share_memory_share_it_under_a_wire_dtype_too(wire: str) -> None:
    base = torch.randn(64, 64)
    saved = {"base": base, "turned": base.T, "row": base[5:7]}
    archive = plan(saved, wire_dtype=wire)
    back = read(archive.to_bytes())
    assert archive.total_bytes < plan({"base": base}, wire_dtype=wire).total_bytes + 512
    assert torch.equal(back["turned"], back["base"].T)
    assert torch.equal(back["row"], back["base"][5:7])
    assert float((back["base"] - base).abs().max()) < 0.05
