"""Where each tensor of a loaded model lies: written by the weights owner, read by every runner that maps the same memory.

A *segment* is one stretch of exportable memory on one device (`segments`), a *block* is the part of a segment that holds one
storage, and a *placed* tensor is a view of a block. Tensors that were one object stay one object (tied weights), and tensors
that shared a storage share it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from edif_mesh.errors import ModelLoadError

ALIGN_BYTES = 512
"""Of a block in its segment: what an allocator of a GPU gives, so that no kernel takes a slower way."""
SEGMENT_BYTES = 2 << 30
"""Segments are no larger unless one storage is: while weights move into them, so much is held twice."""
_PARAMETER, _BUFFER, _ATTRIBUTE = "parameter", "buffer", "attribute"


@dataclass(frozen=True, slots=True)
class Segment:
    """One stretch of memory on one device, as `cpu` or `cuda:0`."""

    device: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes `offset` to `offset + size_bytes` of the segment with that number."""

    segment: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor under all of its names (`transformer.wte.weight`); shape, stride and offset in elements of `dtype`."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    """Of each name: `parameter`, `buffer` or `attribute`."""
    block: int
    """-1 for a tensor without elements."""
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    requires_grad: bool
    device: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole model."""

    segments: tuple[Segment, ...]
    blocks: tuple[Block, ...]
    tensors: tuple[Placed, ...]

    def to_json(self) -> bytes:
        """Return it as bytes for `from_json`."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Rebuild what `to_json` has written; the owner is trusted, so this checks nothing but names."""
        value = json.loads(raw)
        lists = ("names", "kinds", "shape", "stride")
        return cls(
            tuple(Segment(**item) for item in value["segments"]),
            tuple(Block(**item) for item in value["blocks"]),
            tuple(Placed(**{**item, **{name: tuple(item[name]) for name in lists}}) for item in value["tensors"]),
        )

    def names_at(self, segment: int, start: int, end: int) -> list[str]:
        """Return the tensors that lie, wholly or in part, in the bytes `start` to `end` of a segment."""
        hit = {
            number
            for number, block in enumerate(self.blocks)
            if block.segment == segment and block.offset < end and start < block.offset + block.size_bytes
        }
        return [placed.names[0] for placed in self.tensors if placed.block in hit]


def lay_out(sizes: list[tuple[str, int]], most_bytes: int = SEGMENT_BYTES) -> tuple[list[Segment], list[Block]]:
    """Return segments and, in the order of `sizes` (device, bytes), a block for each; blocks of one device follow each other."""
    segments: list[Segment] = []
    blocks: list[Block] = []
    open_: dict[str, int] = {}
    for device, size in sizes:
        number = open_.get(device, -1)
        used = segments[number].size_bytes if number >= 0 else 0
        start = -(-used // ALIGN_BYTES) * ALIGN_BYTES
        if number < 0 or start + size > most_bytes:
            open_[device] = number = len(segments)
            segments.append(Segment(device, 0))
            start = 0
        segments[number] = Segment(device, start + size)
        blocks.append(Block(number, start, size))
    return segments, blocks


@dataclass(slots=True)
class Taken:
    """One tensor of a model as it was loaded, with where in its storage it begins and ends (bytes)."""

    tensor: Any
    names: list[str]
    kinds: list[str]
    start: int
    end: int


def describe(module: Any, most_bytes: int = SEGMENT_BYTES) -> tuple[Manifest, list[list[Taken]]]:
    """Return where the tensors of a loaded `module` shall lie, and for each block the tensors whose bytes it takes.

    Raises ModelLoadError, with the tensor's name, for what cannot be mapped by other processes.
    """
    groups: dict[tuple[str, int], list[Taken]] = {}
    empty: list[Taken] = []
    for taken in _inventory(module):
        if taken.start == taken.end:
            empty.append(taken)
        else:
            key = (str(taken.tensor.device), taken.tensor.untyped_storage().data_ptr())
            groups.setdefault(key, []).append(taken)
    starts = {key: min(t.start for t in group) // 16 * 16 for key, group in groups.items()}
    sizes = [(key[0], max(t.end for t in group) - starts[key]) for key, group in groups.items()]
    segments, blocks = lay_out(sizes, most_bytes)
    placed = [_placed(taken, -1, 0) for taken in empty]
    for number, (key, group) in enumerate(groups.items()):
        placed += [_placed(taken, number, starts[key]) for taken in group]
    return Manifest(tuple(segments), tuple(blocks), tuple(placed)), list(groups.values())


def bind(module: Any, manifest: Manifest, block_storage: Callable[[int], Any]) -> None:
    """Give `module`, of the same architecture, the tensors of `manifest`; `block_storage(n)` returns block n's storage.

    Raises ModelLoadError when the module then still has a tensor without memory.
    """
    import torch

    owners = dict(module.named_modules())
    storages: dict[int, Any] = {}
    for placed in manifest.tensors:
        if placed.block >= 0 and placed.block not in storages:
            storages[placed.block] = block_storage(placed.block)
        tensor = torch.empty(0, dtype=getattr(torch, placed.dtype), device=placed.device)
        if placed.block >= 0:
            tensor.set_(storages[placed.block], placed.offset, placed.shape, placed.stride)
        else:
            tensor = tensor.new_empty(placed.shape)
        if _PARAMETER in placed.kinds:
            tensor = torch.nn.Parameter(tensor, requires_grad=placed.requires_grad)
        for name, kind in zip(placed.names, placed.kinds, strict=True):
            path, _, last = name.rpartition(".")
            _slot(owners[path], kind)[last] = tensor
    for name, tensor, _ in _tensors(module):
        if tensor.device.type == "meta":
            raise ModelLoadError(f"{name} was not among the weights that their owner has shared.")


def block_bytes(taken: list[Taken], size: int) -> Any:
    """Return the bytes of a block as they lie in the storage of the loaded model, on its device."""
    import torch

    start = min(item.start for item in taken) // 16 * 16
    source = taken[0].tensor
    flat = torch.empty(0, dtype=torch.uint8, device=source.device)
    return flat.set_(source.untyped_storage(), start, (size,), (1,))


# ------------------------------------------------------------------------------------------------------------- inside


def _inventory(module: Any) -> list[Taken]:
    found: dict[int, Taken] = {}
    for name, tensor, kind in _tensors(module):
        _demand_plain(name, tensor)
        if id(tensor) in found:
            found[id(tensor)].names.append(name)
            found[id(tensor)].kinds.append(kind)
            continue
        size = tensor.element_size()
        first = tensor.storage_offset() * size
        reach = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
        last = first if tensor.numel() == 0 else first + (reach + 1) * size
        found[id(tensor)] = Taken(tensor, [name], [kind], first, last)
    return list(found.values())


def _tensors(module: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield every tensor that a module holds, also as a plain attribute (rotary embeddings keep one so)."""
    import torch

    for path, part in module.named_modules():
        for kind in (_PARAMETER, _BUFFER, _ATTRIBUTE):
            for name, value in _slot(part, kind).items():
                if isinstance(value, torch.Tensor):
                    yield (f"{path}.{name}" if path else name), value, kind


def _slot(part: Any, kind: str) -> dict[str, Any]:
    if kind == _ATTRIBUTE:
        return part.__dict__  # type: ignore[no-any-return]
    return part._parameters if kind == _PARAMETER else part._buffers  # type: ignore[no-any-return]


def _demand_plain(name: str, tensor: Any) -> None:
    import torch

    if tensor.device.type == "meta":
        raise ModelLoadError(
            f"{name} has no memory on a device: the device map offloads it, which runners cannot share. "
            "Spread the model over more devices, or load it in a smaller dtype."
        )
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        raise ModelLoadError(
            f"{name} is a {type(tensor).__name__}, whose memory runners on a GPU cannot share yet. "
            "Load the model without that quantization, or on the CPU."
        )


def _placed(taken: Taken, block: int, start: int) -> Placed:
    tensor = taken.tensor
    return Placed(
        names=tuple(taken.names),
        kinds=tuple(taken.kinds),
        block=block,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        offset=(taken.start - start) // tensor.element_size() if block >= 0 else 0,
        requires_grad=bool(tensor.requires_grad),
        device=str(tensor.device),
    )
