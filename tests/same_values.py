"""Exact comparison of nested values: types, bits of floats and tensors, order of dictionaries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def assert_same(got: Any, want: Any, where: str = "value") -> None:
    """Fail, naming the place, unless `got` is what `want` is in type and every bit."""
    assert type(got) is type(want), f"{where}: {type(got)} instead of {type(want)}"
    if isinstance(want, torch.Tensor):
        assert (got.dtype, got.shape) == (want.dtype, want.shape), where
        assert got.requires_grad == want.requires_grad, where
        assert bits(got) == bits(want), where
    elif isinstance(want, np.ndarray | np.generic):
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes()), where
    elif isinstance(want, dict):
        assert len(got) == len(want), where
        for (got_key, got_value), (key, value) in zip(got.items(), want.items(), strict=True):
            assert_same(got_key, key, f"{where} key")
            assert_same(got_value, value, f"{where}[{key!r}]")
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), where
        for number, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    elif isinstance(want, float | complex):
        assert repr(got) == repr(want), where
    else:
        assert got == want, where


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's elements as bytes, in order."""
    dense = tensor.new_empty(tensor.numel()).copy_(tensor.detach().reshape(-1))  # one element may keep any stride
    return bytes(dense.view(torch.uint8).numpy()) if dense.numel() else b""
