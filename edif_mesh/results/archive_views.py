"""Which bytes of which storages an archive ships: each view alone, or the span that several views share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from edif_mesh.results.archive_types import BARE, MAX_REPEAT, NAMES, SMALL_BYTES
from edif_mesh.results.wire_dtypes import LEAST_ELEMENTS, to_wire

Node = dict[str, Any]


class Views:
    """Collects the tensors of one result, then gives each its storage, offset and strides.

    Views of one storage that cover no less than their span keep sharing it. A lone `logits[0, -1]` ships its own
    numbers only. Views of two dtypes on one storage are shipped apart.
    """

    def __init__(self, add_storage: Callable[[memoryview, int], int], wire_dtype: str = "") -> None:
        """`add_storage(data, bytes of one number)` returns a storage's number."""
        self._add_storage, self._wire = add_storage, wire_dtype
        self._groups: dict[tuple[int, str], list[tuple[torch.Tensor, Node]]] = {}

    def add(self, tensor: torch.Tensor, node: Node) -> Node:
        """Take a detached strided tensor without conj and neg bits; `node` is completed by `place` and returned at once."""
        node["d"] = NAMES[tensor.dtype]
        if tensor.dtype in BARE:
            tensor = tensor.view(BARE[tensor.dtype])
        if tensor.device.type != "cpu" or not tensor.numel() or _repeats_too_much(tensor):
            tensor = tensor.cpu().contiguous()
        self._groups.setdefault((tensor.untyped_storage().data_ptr(), node["d"]), []).append((tensor, node))
        return node

    def place(self) -> None:
        """Complete every node, in the order in which storages were first met."""
        for views in self._groups.values():
            if self._wire:  # few numbers stay exact, also where they are a part of many
                self._place([view for view in views if view[0].numel() >= LEAST_ELEMENTS])
                self._place([view for view in views if view[0].numel() < LEAST_ELEMENTS])
            else:
                self._place(views)

    def _place(self, views: list[tuple[torch.Tensor, Node]]) -> None:
        spans = [_span(tensor) for tensor, _ in views if tensor.numel()]
        low, high = min((s[0] for s in spans), default=0), max((s[1] for s in spans), default=0)
        if spans and high - low <= sum(s[2] for s in spans):
            self._share(views, low, high)
        else:
            for tensor, node in views:
                self._alone(tensor, node)

    def _share(self, views: list[tuple[torch.Tensor, Node]], low: int, high: int) -> None:
        first = views[0][0]
        span = torch.empty(0, dtype=first.dtype).set_(
            first.untyped_storage(), low // first.element_size(), ((high - low) // first.element_size(),)
        )
        short = self._shortened(span, [node for _, node in views])
        shipped, begin, end = (span, low, high) if short is None else (short, 0, short.numel() * short.element_size())
        number = self._add_storage(raw_bytes(shipped, begin, end), shipped.element_size())
        for tensor, node in views:
            offset = tensor.storage_offset() - low // tensor.element_size() if tensor.numel() else 0
            _complete(node, tensor, offset, number)

    def _alone(self, tensor: torch.Tensor, node: Node) -> None:
        dense = tensor if tensor.is_contiguous() else tensor.clone()  # in the order of its strides
        shipped = self._shortened(dense, [node])
        shipped = dense if shipped is None else shipped
        low = shipped.storage_offset() * shipped.element_size()
        size = shipped.numel() * shipped.element_size()
        data = raw_bytes(shipped, low, low + size) if size else memoryview(b"")
        _complete(node, dense, 0, self._add_storage(data, shipped.element_size()))

    def _shortened(self, tensor: torch.Tensor, nodes: list[Node]) -> torch.Tensor | None:
        """The tensor in the wire dtype, which is noted in the nodes; None where it is sent as it is."""
        if not self._wire or any(node["t"] != "tensor" for node in nodes):
            return None
        short = to_wire(tensor, self._wire)
        if short is None:
            return None
        for node in nodes:
            node.update(short[1])
        return short[0]


def _complete(node: Node, tensor: torch.Tensor, offset: int, storage: int) -> None:
    node.update(shape=list(tensor.shape), stride=list(tensor.stride()), o=offset, s=storage)


def _repeats_too_much(tensor: torch.Tensor) -> bool:
    low, high, dense = _span(tensor)
    return dense > SMALL_BYTES and dense > MAX_REPEAT * (high - low)


def _span(tensor: torch.Tensor) -> tuple[int, int, int]:
    """The first and the end byte of the storage that the view touches, and the bytes of a dense copy."""
    size = tensor.element_size()
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * size
    return start, start + (reach + 1) * size, math.prod(tensor.shape) * size


def raw_bytes(tensor: torch.Tensor, low: int, high: int) -> memoryview:
    """Return the bytes `low` to `high` of the tensor's storage, one or more, without a copy."""
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), low, (high - low,))
    if tensor.dtype is torch.bool and int(flat.max()) > 1:
        flat = (flat != 0).view(torch.uint8)  # bytes that were viewed as bool; a reader takes only 0 and 1
    return memoryview(flat.numpy())
