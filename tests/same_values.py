"""Exact comparison of nested values: types, bits, layout and strides of tensors, order of dictionaries."""

from __future__ import annotations

import json
import math
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from edif_mesh.results.archive_types import BARE


def assert_same(got: Any, want: Any, where: str = "value") -> None:
    """Fail, naming the place, unless `got` is what `want` is in type and every bit."""
    assert type(got) is type(want), f"{where}: {type(got)} instead of {type(want)}"
    if isinstance(want, torch.Tensor):
        _assert_same_tensor(got, want, where)
    elif isinstance(want, np.ndarray | np.generic):
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes()), where
        assert got.ndim < 2 or got.flags.f_contiguous == want.flags.f_contiguous, where
    elif isinstance(want, dict):
        assert len(got) == len(want), where
        assert getattr(got, "default_factory", None) is getattr(want, "default_factory", None), where
        for (got_key, got_value), (key, value) in zip(got.items(), want.items(), strict=True):
            assert_same(got_key, key, f"{where} key")
            assert_same(got_value, value, f"{where}[{key!r}]")
    elif isinstance(want, list | tuple | deque):
        assert len(got) == len(want), where
        assert getattr(got, "maxlen", None) == getattr(want, "maxlen", None), where
        for number, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    elif isinstance(want, float | complex):
        assert repr(got) == repr(want), where
    elif type(want).__module__.startswith("tokenizers") or type(want).__name__ == "Encoding":
        assert json.loads(_state(got)) == json.loads(_state(want)), where
    elif isinstance(want, SimpleNamespace) or type(want).__module__.startswith("transformers."):
        assert_same({**vars(got)}, {**vars(want)}, where)
    else:
        assert got == want, where


def _assert_same_tensor(got: torch.Tensor, want: torch.Tensor, where: str) -> None:
    assert (got.dtype, got.shape, got.layout) == (want.dtype, want.shape, want.layout), where
    assert got.requires_grad == want.requires_grad, where
    got, want = got.detach(), want.detach()
    if want.layout is torch.sparse_coo:
        assert got.is_coalesced() == want.is_coalesced(), where
        parts = [(t._indices(), t._values()) for t in (got, want)]
    elif want.layout is not torch.strided:
        rows = want.layout in (torch.sparse_csr, torch.sparse_bsr)
        parts = [
            (t.crow_indices(), t.col_indices(), t.values()) if rows else (t.ccol_indices(), t.row_indices(), t.values())
            for t in (got, want)
        ]
    elif want.is_quantized:
        assert got.qscheme() == want.qscheme(), where
        parts = [(t.int_repr(), *_scales(t)) for t in (got, want)]
    else:
        assert (got.is_conj(), got.is_neg()) == (want.is_conj(), want.is_neg()), where
        assert bits(got) == bits(want), where
        return
    for number, (a, b) in enumerate(zip(*parts, strict=True)):
        assert_same(a, b, f"{where} part {number}")


def _scales(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.qscheme() is torch.per_tensor_affine:
        return tensor.q_scale(), tensor.q_zero_point()
    return tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()


def _state(value: Any) -> str:
    state = value.__getstate__()
    return json.dumps(state) if isinstance(state, dict) else state.decode()


def assert_same_strides(got: torch.Tensor, want: torch.Tensor) -> None:
    """Fail unless the strides are the same, or the view had gaps and came back without, in the same order."""
    dense = math.prod(want.shape)
    reach = 1 + sum((n - 1) * s for n, s in zip(want.shape, want.stride(), strict=True))
    assert got.stride() == (want.stride() if reach <= dense or not dense else want.clone().stride())


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's elements as bytes, in order."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    tensor = tensor.view(BARE.get(tensor.dtype, tensor.dtype))
    dense = tensor.new_empty(tensor.numel()).copy_(tensor.reshape(-1))  # one element may keep any stride
    return bytes(dense.view(torch.uint8).numpy()) if dense.numel() else b""
