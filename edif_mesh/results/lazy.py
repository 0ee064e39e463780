"""Results of which only what is used is fetched: `result["acts"][:, -1]`; or an archive file that is only mapped."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edif_mesh.errors import ArchiveError, ResultError
from edif_mesh.results.archive_decode import Decoder
from edif_mesh.results.archive_decode_tensors import Tensors, layout_of
from edif_mesh.results.archive_records import (
    HEAD,
    HEAD_BYTES,
    RECORD_BYTES,
    TAIL_BYTES,
    Tree,
    parse_tail,
    parse_tree,
)
from edif_mesh.results.export import as_numpy, holds, leaves, to_safetensors
from edif_mesh.results.index import Index
from edif_mesh.results.lazy_index import merged
from edif_mesh.results.lazy_plan import Plan, plan_of
from edif_mesh.results.lazy_tensor import LazyTensor, Run, no_waiting
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import FileSink
from edif_mesh.wire.messages import Manifest

__all__ = ["LazyResult", "LazyTensor", "no_waiting", "open_archive", "open_result"]


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
        """Return every tensor and array as numpy, by its dotted name; see `export.as_numpy`."""
        return {
            name: as_numpy(leaf.load() if isinstance(leaf, LazyTensor) else leaf)
            for name, leaf in leaves(self._values)
            if isinstance(leaf, torch.Tensor | LazyTensor) or type(leaf).__module__ == "numpy"
        }

    def save(self, folder: Path) -> list[str]:
        """Write `tensors.safetensors`, and `values.txt` with everything else, into `folder`; returns the names in the latter."""
        folder.mkdir(parents=True, exist_ok=True)
        others = [(name, leaf) for name, leaf in leaves(self._values) if not holds(leaf)]
        if len(others) < len(list(leaves(self._values))):
            to_safetensors(self._values, folder / "tensors.safetensors")
        (folder / "values.txt").write_text("".join(f"{name} = {leaf!r}\n" for name, leaf in others))
        return sorted(name for name, _ in others)

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


class MappedFile:
    """An archive file, of which the kernel reads the pages that are used."""

    fetched_bytes = 0
    private = True
    """What is written into `view` does not reach the file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= HEAD_BYTES or file.read(HEAD_BYTES) != HEAD:
                raise ArchiveError(
                    f"{path} is no archive of version 2; `edif_mesh.results.archive.read` reads older ones."
                )
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

    private = False

    def __init__(self, reader: ResultReader, sink: FileSink, manifest: Manifest, index: Index, run: Run) -> None:
        self._reader, self._sink, self._manifest, self._index = reader, sink, manifest, index
        self._one = asyncio.Lock()
        self._run = run
        self._closed = False
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
            if self._closed and not self._reader.holds(chunks):
                raise ResultError("This result was closed, and what you ask for is not here: open it again.")
            await self._reader.fetch_chunks(self._manifest, self._index, sorted(chunks))

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """See `lazy_tensor.Pieces`."""
        self._run(work)

    def close(self) -> None:
        """What has come stays in its file."""
        self._closed = True
        self._sink.close()


def open_archive(path: Path, classes: Mapping[str, type] | None = None) -> LazyResult:
    """Open an `.edif` file without reading it: what is indexed is read. Raises ArchiveError, OSError."""
    pieces = MappedFile(path)
    tree = _tree(pieces.view)
    return LazyResult(_values(tree, plan_of(tree), pieces, classes), pieces)


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
    plan = plan_of(tree)
    await pieces.need(merged([(at, at + size) for at, size in map(tree.storages.__getitem__, plan.whole) if size]))
    return LazyResult(_values(tree, plan, pieces, classes), pieces)


def _tree(view: memoryview) -> Tree:
    offset, size = parse_tail(view[-TAIL_BYTES:], len(view))
    return parse_tree(view[offset : offset + size], offset - RECORD_BYTES)


def _values(
    tree: Tree, plan: Plan, pieces: FetchedPieces | MappedFile, classes: Mapping[str, type] | None
) -> dict[str, Any]:
    tensors = _LazyTensors(tree, plan, pieces)
    return Decoder([], dict(classes or {}), tensors=tensors).mapping(tree.values)


class _Storages(Sequence[torch.Tensor]):
    """Storages over bytes that are here; copied where they lie in a file that others go on with."""

    def __init__(self, tree: Tree, whole: frozenset[int], pieces: FetchedPieces | MappedFile) -> None:
        self._places, self._whole, self._pieces = tree.storages, whole, pieces
        self._copies: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        at, size = self._places[number]
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        if number not in self._whole:
            raise ArchiveError("A value of the archive is made of bytes that its tree does not name there.")
        if number not in self._copies:
            data = torch.frombuffer(self._pieces.view, dtype=torch.uint8, count=size, offset=at)
            self._copies[number] = data if self._pieces.private else data.clone()
        return self._copies[number]


class _LazyTensors(Tensors):
    """Large plain tensors are left where they are; everything else is made at once."""

    def __init__(self, tree: Tree, plan: Plan, pieces: FetchedPieces | MappedFile) -> None:
        super().__init__(_Storages(tree, plan.whole, pieces), sum(size for _, size in tree.storages))
        self._tree, self._plan, self._pieces = tree, plan, pieces

    def tensor(self, node: dict[str, Any]) -> Any:
        """Return the tensor of a node, or a LazyTensor."""
        if id(node) not in self._plan.lazy:
            return super().tensor(node)
        at, size = self._tree.storages[node["s"]]
        return LazyTensor(self._pieces, layout_of(node, size), node, at, size)
