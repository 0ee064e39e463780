"""Comparison of what a construct gave locally and through the mesh: equal to the last bit, in value and in kind."""

from __future__ import annotations

from typing import Any

import torch


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, in value and in kind; gradients' graphs do not travel."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "key_cache") or type(one).__name__.endswith("Cache"):
        return type(one) is type(other) and all(
            torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            for a, b in zip(one.layers, other.layers, strict=True)
        )
    return type(one) is type(other) and bool(one == other)
