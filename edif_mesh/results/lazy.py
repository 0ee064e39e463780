"""Results of which only what is used is fetched: `result["acts"][:, -1]`; or an archive file that is only mapped."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edif_mesh.errors import ArchiveError
from edif_mesh.results.archive_decode import Decoder
from edif_mesh.results.archive_decode_tensors import Tensors, layout_of
from edif_mesh.results.archive_records import RECORD_BYTES, TAIL_BYTES, Tree, parse_tail, parse_tree
from edif_mesh.results.export import leaves, to_safetensors
from edif_mesh.results.index import Index
from edif_mesh.results.lazy_tensor import LazyTensor, Pieces, Run, no_waiting
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import FileSink
from edif_mesh.wire.messages import Manifest

__all__ = ["LazyResult", "LazyTensor", "no_waiting", "open_archive", "open_result"]
LAZY_BYTES = 64 << 10
"""A smaller tensor comes with its neighbours anyway."""


class LazyResult(Mapping[str, Any]):
    """Saved values by name; large tensors are `LazyTensor`, wherever in lists and dictionaries they stand."""

    def __init__(self, values: dict[str, Any], pieces: FetchedPieces | MappedFile) -> None:
        self._values, self._pieces = values, pieces

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return "LazyResult(" + "; ".join(f"{name}: {what}" for name, what in self.summary()) + ")"

    @property
    def fetched_bytes(self) -> int:
        """What has come over the wire for this result so far, index and structure included."""
        return self._pieces.fetched_bytes

    def summary(self) -> list[tuple[str, str]]:
        """Return every leaf by its dotted name and what it is; fetches nothing."""
        return [(name, describe(leaf)) for name, leaf in leaves(self._values)]

    def to_safetensors(self, path: Path) -> list[str]:
        """Write all tensors to one file; returns the names of what safetensors cannot hold. See `export.to_safetensors`."""
        return to_safetensors(self._values, path)

    def to_numpy(self) -> dict[str, Any]:
        """Return every tensor and array as numpy, by its dotted name; bfloat16 as float32."""
        return {
            name: _as_numpy(leaf)
            for name, leaf in leaves(self._values)
            if isinstance(leaf, torch.Tensor | LazyTensor) or type(leaf).__module__ == "numpy"
        }

    def save(self, folder: Path) -> list[str]:
        """Write `tensors.safetensors`, and `values.txt` with everything else, into `folder`; returns the names in the latter."""
        folder.mkdir(parents=True, exist_ok=True)
        others = [
            (name, leaf) for name, leaf in leaves(self._values) if not isinstance(leaf, torch.Tensor | LazyTensor)
        ]
        left_out = set(to_safetensors(self._values, folder / "tensors.safetensors"))
        told = [f"{name} = {leaf!r}" for name, leaf in others if name in left_out]
        (folder / "values.txt").write_text("".join(line + "\n" for line in told))
        return sorted(left_out)

    def close(self) -> None:
        """Give up what is kept open; tensors that were fetched stay."""
        self._pieces.close()

    def __enter__(self) -> LazyResult:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def describe(leaf: Any) -> str:
    """Return what a leaf is in a few words."""
    if isinstance(leaf, torch.Tensor | LazyTensor) or (type(leaf).__module__ == "numpy" and hasattr(leaf, "nbytes")):
        dtype = str(leaf.dtype).removeprefix("torch.")
        return f"{dtype} {list(leaf.shape)}, {leaf.nbytes:,} bytes"
    text = repr(leaf)
    return text if len(text) <= 60 else text[:57] + "..."


def _as_numpy(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        leaf = leaf.detach()
        return (leaf.float() if leaf.dtype is torch.bfloat16 else leaf).numpy()
    return leaf.numpy() if isinstance(leaf, LazyTensor) else leaf


class MappedFile:
    """An archive file, of which the kernel reads the pages that are used."""

    fetched_bytes = 0

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.view = memoryview(self._map)

    async def need(self, ranges: list[tuple[int, int]]) -> None:
        """All is there."""

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """There is nothing to wait for."""
        work.close()

    def close(self) -> None:
        """Its memory is given back with the last tensor over it."""


class FetchedPieces:
    """A result at the mesh, with the chunks that have come in a file that later processes go on with."""

    def __init__(self, reader: ResultReader, sink: FileSink, manifest: Manifest, index: Index, run: Run) -> None:
        self._reader, self._sink, self._manifest, self._index = reader, sink, manifest, index
        self._one = asyncio.Lock()
        self._run = run
        self.view = sink.map(manifest.archive_bytes)

    @property
    def fetched_bytes(self) -> int:
        """What has come over the wire."""
        return self._reader.fetched_bytes

    async def need(self, ranges: list[tuple[int, int]]) -> None:
        """Fetch the chunks that hold these bytes and are not here."""
        chunks: set[int] = set()
        for start, stop in ranges:
            chunks.update(self._index.covering(start, stop))
        async with self._one:
            await self._reader.fetch_chunks(self._manifest, self._index, sorted(chunks))

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """See `lazy_tensor.Pieces`."""
        self._run(work)

    def close(self) -> None:
        """What has come stays in its file."""
        self._sink.close()


def open_archive(path: Path, classes: Mapping[str, type] | None = None) -> LazyResult:
    """Open an `.edif` file without reading it: what is indexed is read. Raises ArchiveError, OSError."""
    pieces = MappedFile(path)
    tree = _tree(pieces.view)
    return LazyResult(_values(tree, pieces, classes), pieces)


async def open_result(
    reader: ResultReader, sink: FileSink, manifest: Manifest, run: Run, classes: Mapping[str, type] | None = None
) -> LazyResult:
    """Open a result at the mesh, of which only the structure is fetched; `run` as in `Pieces`. Raises as `ResultReader.read`."""
    index = await reader.prepare(manifest)
    pieces = FetchedPieces(reader, sink, manifest, index, run)
    end = manifest.archive_bytes
    await pieces.need([(max(0, end - TAIL_BYTES), end)])
    offset, size = parse_tail(pieces.view[-TAIL_BYTES:], end)
    await pieces.need([(offset, offset + size)])
    tree = _tree(pieces.view)
    for place in small_places(tree):
        await pieces.need([place])
    return LazyResult(_values(tree, pieces, classes), pieces)


def small_places(tree: Tree) -> list[tuple[int, int]]:
    """The bytes of all storages that are taken at once: those that no lazy tensor lies in."""
    lazy: set[int] = set()
    for node in _nodes(tree.values):
        if _is_lazy(node, tree):
            lazy.add(node["s"])
    wanted = sorted((at, at + size) for number, (at, size) in enumerate(tree.storages) if size and number not in lazy)
    merged: list[tuple[int, int]] = []
    for start, stop in wanted:
        if merged and start - merged[-1][1] < LAZY_BYTES:
            merged[-1] = merged[-1][0], stop
        else:
            merged.append((start, stop))
    return merged


def _tree(view: memoryview) -> Tree:
    offset, size = parse_tail(view[-TAIL_BYTES:], len(view))
    return parse_tree(view[offset : offset + size], offset - RECORD_BYTES)


def _values(tree: Tree, pieces: Pieces, classes: Mapping[str, type] | None) -> dict[str, Any]:
    tensors = _LazyTensors(tree, pieces)
    return Decoder([], dict(classes or {}), tensors=tensors).mapping(tree.values)


def _is_lazy(node: Any, tree: Tree) -> bool:
    """Whether a node becomes a LazyTensor, as far as its own fields say."""
    if not isinstance(node, dict) or node.get("t") != "tensor" or "p" in node:
        return False
    number = node.get("s")
    return type(number) is int and 0 <= number < len(tree.storages) and tree.storages[number][1] >= LAZY_BYTES


def _nodes(values: list[Any]) -> Iterator[Any]:
    """Every node of a tree that stands for itself; not the parts of sparse and quantized tensors."""
    stack: list[Any] = list(values)
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            yield node
            if node.get("t") not in _WHOLE:
                stack.extend(node.values())


_WHOLE = frozenset({"coo", "csr", "csc", "bsr", "bsc", "quantized"})


class _Storages(Sequence[torch.Tensor]):
    """Storages over bytes that have come."""

    def __init__(self, tree: Tree, view: memoryview) -> None:
        self._places, self._view = tree.storages, view

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        at, size = self._places[number]
        return (
            torch.frombuffer(self._view, dtype=torch.uint8, count=size, offset=at)
            if size
            else torch.empty(0, dtype=torch.uint8)
        )


class _LazyTensors(Tensors):
    """Large plain tensors are left where they are; everything else is made at once, in memory of its own."""

    def __init__(self, tree: Tree, pieces: Pieces) -> None:
        super().__init__(_Storages(tree, pieces.view), sum(size for _, size in tree.storages))
        self._tree, self._pieces = tree, pieces

    def tensor(self, node: dict[str, Any]) -> Any:
        """Return the tensor of a node, or a LazyTensor."""
        if not _is_lazy(node, self._tree):
            made = super().tensor(node)
            return made.clone() if node["t"] == "tensor" and "p" not in node else made
        at, size = self._tree.storages[node["s"]]
        return LazyTensor(self._pieces, layout_of(node, size), node, at, size)

    def _part(self, node: Any) -> torch.Tensor:
        if not isinstance(node, dict) or node.get("t") not in ("tensor", "lazy"):
            raise ArchiveError("A part of a tensor is no plain tensor.")
        return Tensors.tensor(self, node)
