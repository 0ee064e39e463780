"""The port between weights and the memory that several processes map: who makes segments, who attaches to them, by what.

The weights owner makes segments, fills them, publishes them and hands each runner-to-be a `Handle` (and a descriptor where the
kind of memory has one). `SharedMemory` is the adapter for the CPU; those for CUDA are in `cuda_segments`.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edif_mesh.errors import ModelLoadError
from site_agent.hosting.manifest import Manifest, Segment

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value
_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4 | 0x8
"""F_SEAL_SEAL, SHRINK, GROW, WRITE: for good, also for the owner."""


@dataclass(frozen=True, slots=True)
class Handle:
    """What another process needs to map a segment, besides its descriptor; `token` is the kind's own, in hexadecimal."""

    device: str
    size_bytes: int
    token: str = ""


@dataclass(frozen=True, slots=True)
class Mapped:
    """A segment in this process: its first address, and how many bytes are there (no fewer than were asked for)."""

    pointer: int
    size_bytes: int
    device: str


class SegmentStore(Protocol):
    """One kind of memory in one process; what it maps stays mapped until the process ends."""

    def create(self, segment: Segment) -> Mapped:
        """Make zeroed memory that this process may write. Raises ModelLoadError when there is not enough."""

    def publish(self) -> list[tuple[Handle, int]]:
        """Close what was created against writing as far as the kind can, and return each handle with a descriptor or -1.

        The addresses that `create` gave are void; the owner attaches like everybody else.
        """

    def attach(self, handle: Handle, descriptor: int) -> Mapped:
        """Map a published segment; the descriptor stays the caller's. Raises ModelLoadError or SandboxError."""


class SharedMemory:
    """The CPU's: files in memory. Attaching is private (copy-on-write) and the files are sealed.

    With `writable` they are neither: as with CUDA IPC, whoever has attached can change them for all. For tests.
    """

    def __init__(self, *, writable: bool = False) -> None:
        self._writable = writable
        self._made: list[tuple[Handle, int, int]] = []

    def create(self, segment: Segment) -> Mapped:
        """As the port says."""
        size = -(-segment.size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = os.memfd_create("edif-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        handle, address = Handle(segment.device, size), _map(descriptor, size, mmap.MAP_SHARED)
        self._made.append((handle, descriptor, address))
        return Mapped(address, size, segment.device)

    def publish(self) -> list[tuple[Handle, int]]:
        """As the port says."""
        for handle, descriptor, address in self._made:
            _libc.munmap(address, handle.size_bytes)
            if not self._writable:
                fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
        return [(handle, descriptor) for handle, descriptor, _ in self._made]

    def attach(self, handle: Handle, descriptor: int) -> Mapped:
        """As the port says."""
        flags = mmap.MAP_SHARED if self._writable else mmap.MAP_PRIVATE
        return Mapped(_map(descriptor, handle.size_bytes, flags), handle.size_bytes, handle.device)


def _map(descriptor: int, size: int, flags: int) -> int:
    """Map without an object that would unmap when it is forgotten; tensors hold bare addresses."""
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
    if address in (None, _MAP_FAILED):
        raise ModelLoadError(f"{size / 1e9:,.2f} GB of weights could not be mapped: {os.strerror(ctypes.get_errno())}.")
    return int(address)


def storage_at(mapped: Mapped, offset: int, size_bytes: int) -> Any:
    """Return an untyped torch storage over mapped memory; torch neither owns nor frees it."""
    import torch

    assert 0 <= offset <= offset + size_bytes <= mapped.size_bytes
    return torch._C._construct_storage_from_data_pointer(
        mapped.pointer + offset, torch.device(mapped.device), size_bytes
    )


def block_storages(manifest: Manifest, mapped: Sequence[Mapped]) -> Any:
    """Return the function from a block's number to its storage that `manifest.bind` wants."""

    def block_storage(number: int) -> Any:
        block = manifest.blocks[number]
        return storage_at(mapped[block.segment], block.offset, block.size_bytes)

    return block_storage


def words_of(mapped: Mapped) -> Any:
    """Return a whole segment as a flat int32 tensor, for the weights check."""
    import torch

    storage = storage_at(mapped, 0, mapped.size_bytes)
    return torch.empty(0, dtype=torch.int32, device=mapped.device).set_(storage, 0, (mapped.size_bytes // 4,), (1,))
