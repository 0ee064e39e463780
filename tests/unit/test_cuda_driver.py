"""The CUDA adapters against a driver that is played through the C calling convention, with memory of the CPU in the place of a GPU's.

It shows order, arguments, widths, clean-up and errors. That a device does the same is for `tests/gpu`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_void_p
from typing import Any

import pytest

from edif_mesh.errors import ModelLoadError
from site_agent.hosting import cuda_driver
from site_agent.hosting.cuda_driver import AccessDescription, AllocationProperties, CudaError, Driver, IpcHandle
from site_agent.hosting.cuda_segments import CudaIpc, CudaVmm
from site_agent.hosting.manifest import Segment

GRANULE = 2 << 20
INVALID, OUT_OF_MEMORY, NOT_PERMITTED, NOT_SUPPORTED = 1, 2, 800, 801
NAMES = {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY", 800: b"CUDA_ERROR_NOT_PERMITTED", 801: b"CUDA_ERROR_NOT_SUPPORTED"}  # fmt: skip
FIRST_HANDLE = 0x7000_0000_0000
"""Needs 64 bits: a handle that was cut to an int is not found."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = c_void_p
_libc.mmap.argtypes = (c_void_p, c_size_t, c_int, c_int, c_int, ctypes.c_long)
_libc.munmap.argtypes = (c_void_p, c_size_t)


class PlayedDriver:
    """`libcuda.so.1` with two devices, as far as we call it. `refuse` names calls that fail, `log` all that were made."""

    def __init__(self, **refuse: int) -> None:
        self.refuse, self.log = refuse, []  # type: ignore[var-annotated]
        self.handles: dict[int, int] = {}
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.allocated: dict[int, int] = {}
        self.context: list[int] = []
        self._next = FIRST_HANDLE
        for name, arguments in {
            "cuInit": (c_uint,), "cuGetErrorName": (c_int, POINTER(c_char_p)), "cuGetErrorString": (c_int, POINTER(c_char_p)),
            "cuDeviceGet": (POINTER(c_int), c_int), "cuDeviceGetCount": (POINTER(c_int),),
            "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int), "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
            "cuCtxPushCurrent_v2": (c_void_p,), "cuCtxPopCurrent_v2": (POINTER(c_void_p),), "cuCtxSynchronize": (),
            "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(AllocationProperties), c_int),
            "cuMemCreate": (POINTER(c_uint64), c_size_t, POINTER(AllocationProperties), c_ulonglong), "cuMemRelease": (c_uint64,),
            "cuMemExportToShareableHandle": (POINTER(c_int), c_uint64, c_int, c_ulonglong),
            "cuMemImportFromShareableHandle": (POINTER(c_uint64), c_void_p, c_int),
            "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_ulonglong),
            "cuMemAddressFree": (c_uint64, c_size_t), "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_ulonglong),
            "cuMemUnmap": (c_uint64, c_size_t), "cuMemSetAccess": (c_uint64, c_size_t, POINTER(AccessDescription), c_size_t),
            "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t), "cuMemsetD8_v2": (c_uint64, c_ubyte, c_size_t),
            "cuIpcGetMemHandle": (POINTER(IpcHandle), c_uint64), "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), IpcHandle, c_uint),
        }.items():  # fmt: skip
            setattr(self, name, CFUNCTYPE(c_int, *arguments)(self._played(name)))

    def _played(self, name: str) -> Callable[..., int]:
        act = getattr(self, f"_{name.removesuffix('_v2')}")

        def call(*arguments: Any) -> int:
            if not name.startswith("cuGetError"):
                self.log.append(name)
                if name in self.refuse:
                    return self.refuse[name]
            return act(*arguments) or 0

        return call

    def _cuInit(self, flags: int) -> int:
        return 0 if flags == 0 else INVALID

    def _cuGetErrorName(self, result: int, text: Any) -> int:
        text[0] = NAMES[result]
        return 0

    def _cuGetErrorString(self, result: int, text: Any) -> int:
        text[0] = b"words"
        return 0

    def _cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device[0] = ordinal
        return 0 if ordinal < 2 else 101

    def _cuDeviceGetCount(self, count: Any) -> None:
        count[0] = 2

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value[0] = 1
        return 0 if attribute in (102, 103) else INVALID

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context[0] = 0x7F00_0000_1000 + device

    def _cuCtxPushCurrent(self, context: int) -> None:
        self.context.append(context - 0x7F00_0000_1000)

    def _cuCtxPopCurrent(self, context: Any) -> None:
        self.context.pop()

    def _cuCtxSynchronize(self) -> int:
        return 0 if self.context else INVALID

    def _cuMemGetAllocationGranularity(self, size: Any, properties: Any, option: int) -> int:
        size[0] = GRANULE
        return 0 if option == 1 else INVALID

    def _cuMemCreate(self, handle: Any, size: int, properties: Any, flags: int) -> int:
        wanted = properties[0]
        if size % GRANULE or (wanted.type, wanted.requested_handle_types, wanted.location.type) != (1, 1, 1) or flags:
            return INVALID
        memory = os.memfd_create("played")
        os.ftruncate(memory, size)
        handle[0] = self._handle(memory)
        return 0

    def _cuMemRelease(self, handle: int) -> int:
        os.close(self.handles.pop(handle))
        return 0

    def _cuMemExportToShareableHandle(self, descriptor: Any, handle: int, kind: int, flags: int) -> int:
        descriptor[0] = os.dup(self.handles[handle])
        return 0 if (kind, flags) == (1, 0) else INVALID

    def _cuMemImportFromShareableHandle(self, handle: Any, descriptor: int, kind: int) -> int:
        handle[0] = self._handle(os.dup(descriptor))
        return 0 if kind == 1 else INVALID

    def _cuMemAddressReserve(self, address: Any, size: int, align: int, wanted: int, flags: int) -> int:
        address[0] = found = _libc.mmap(None, size, mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0, 0x22, -1, 0)
        self.reserved[found] = size
        return 0 if size % GRANULE == 0 else INVALID

    def _cuMemAddressFree(self, address: int, size: int) -> int:
        if address in self.mapped or self.reserved.pop(address, -1) != size:
            return INVALID
        _libc.munmap(address, size)
        return 0

    def _cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> int:
        if self.reserved.get(address) != size or os.fstat(self.handles[handle]).st_size != size:
            return INVALID
        self.mapped[address] = os.dup(self.handles[handle])
        return 0

    def _cuMemUnmap(self, address: int, size: int) -> int:
        os.close(self.mapped.pop(address))
        _libc.mmap(address, size, 0, 0x32, -1, 0)
        return 0

    def _cuMemSetAccess(self, address: int, size: int, description: Any, count: int) -> int:
        assert (count, description[0].location.type) == (1, 1)
        protection = {1: mmap.PROT_READ, 3: mmap.PROT_READ | mmap.PROT_WRITE}[description[0].flags]
        assert _libc.mmap(address, size, protection, 0x11, self.mapped[address], 0) == address
        return 0

    def _cuMemAlloc(self, address: Any, size: int) -> int:
        address[0] = found = _libc.mmap(None, size, 3, 0x22, -1, 0)
        self.allocated[found] = self.context[-1]
        return 0

    def _cuMemsetD8(self, address: int, value: int, count: int) -> None:
        ctypes.memset(address, value, count)

    def _cuIpcGetMemHandle(self, handle: Any, address: int) -> None:
        raw = address.to_bytes(8, "little") + bytes(range(56))
        ctypes.memmove(handle, raw, 64)

    def _cuIpcOpenMemHandle(self, address: Any, handle: IpcHandle, flags: int) -> int:
        raw = bytes(handle)
        address[0] = int.from_bytes(raw[:8], "little")
        return 0 if raw[8:] == bytes(range(56)) and flags == 1 else INVALID

    def _handle(self, memory: int) -> int:
        self._next += 1
        self.handles[self._next] = memory
        return self._next


def writable(address: int) -> bool:
    """Whether this process may write there, by its own page tables."""
    with open("/proc/self/maps") as file:
        for line in file:
            span, rights = line.split()[:2]
            first, _, last = span.partition("-")
            if int(first, 16) <= address < int(last, 16):
                return rights[1] == "w"
    raise AssertionError("nothing is mapped there")


def test_structures_are_as_large_as_the_header_says() -> None:
    assert ctypes.sizeof(cuda_driver.Location) == 8
    assert ctypes.sizeof(AllocationProperties) == 32
    assert AllocationProperties.location.offset == 8
    assert AllocationProperties.win32_handle_meta_data.offset == 16
    assert AllocationProperties.flags.offset == 24
    assert ctypes.sizeof(AccessDescription) == 12
    assert ctypes.sizeof(IpcHandle) == 64


def test_what_the_owner_writes_another_store_reads_and_cannot_write() -> None:
    library = PlayedDriver()
    owner = CudaVmm(library)
    made = owner.create(Segment("cuda:1", GRANULE + 1))
    assert made.size_bytes == 2 * GRANULE
    assert ctypes.string_at(made.pointer, 8) == bytes(8)
    ctypes.memmove(made.pointer + GRANULE, b"weights!", 8)
    [(handle, descriptor)] = owner.publish()
    runner = CudaVmm(library).attach(handle, descriptor)
    assert runner.device == "cuda:1"
    assert ctypes.string_at(runner.pointer + GRANULE, 8) == b"weights!"
    assert not writable(runner.pointer)
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


def test_after_publishing_nothing_is_left_that_could_write_and_no_handle_is_held() -> None:
    library = PlayedDriver()
    owner = CudaVmm(library)
    for number in (0, 1, 0):
        owner.create(Segment(f"cuda:{number}", 10))
    library.log.clear()
    published = owner.publish()
    assert (library.handles, library.reserved, library.mapped) == ({}, {}, {})
    assert [handle.device for handle, _ in published] == ["cuda:0", "cuda:1", "cuda:0"]
    said = [call for call in library.log if call in ("cuCtxSynchronize", "cuMemExportToShareableHandle", "cuMemUnmap")]
    assert said == ["cuCtxSynchronize", "cuMemExportToShareableHandle", "cuMemUnmap"] * 3
    mapped = [owner.attach(handle, descriptor) for handle, descriptor in published]
    assert library.handles == {}  # the mapping keeps the memory
    assert len({item.pointer for item in mapped}) == 3
    assert library.context == []


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess", "cuMemAddressReserve"])
def test_a_mapping_that_fails_leaves_nothing_behind_and_is_named(call: str) -> None:
    library = PlayedDriver(**{call: INVALID})
    with pytest.raises(CudaError, match=rf"refused {call}: CUDA_ERROR_INVALID_VALUE \(words\)"):
        CudaVmm(library).create(Segment("cuda:0", 10))
    assert (library.handles, library.reserved, library.mapped, library.context) == ({}, {}, {}, [])


@pytest.mark.parametrize(("kind", "call"), [(CudaVmm, "cuMemCreate"), (CudaIpc, "cuMemAlloc_v2")])
def test_too_little_memory_is_a_sentence_with_the_way_out(kind: Any, call: str) -> None:
    with pytest.raises(ModelLoadError, match=r"cuda:1 has not enough free memory .*device_map"):
        kind(PlayedDriver(**{call: OUT_OF_MEMORY})).create(Segment("cuda:1", 10))


def test_ipc_hands_over_a_handle_that_opens_the_same_memory_on_its_device() -> None:
    library = PlayedDriver()
    owner = CudaIpc(library)
    made = owner.create(Segment("cuda:1", 100))
    ctypes.memmove(made.pointer, b"weights!", 8)
    [(handle, descriptor)] = owner.publish()
    assert (descriptor, library.allocated[made.pointer]) == (-1, 1)
    assert owner.attach(handle, -1) == made  # a process cannot open its own handle
    assert "cuIpcOpenMemHandle_v2" not in library.log
    opened = CudaIpc(library).attach(handle, -1)
    assert ctypes.string_at(opened.pointer, 8) == b"weights!"


def test_virtual_memory_is_tried_before_it_is_chosen() -> None:
    library = PlayedDriver()
    assert CudaVmm.problem(["cuda:0", "cuda:1"], library) == ""
    assert (library.handles, library.reserved, library.mapped) == ({}, {}, {})
    refused = PlayedDriver(cuMemExportToShareableHandle=NOT_SUPPORTED)
    assert "cuMemExportToShareableHandle: CUDA_ERROR_NOT_SUPPORTED" in CudaVmm.problem(["cuda:1"], refused)
    assert "CUDA_ERROR_NOT_PERMITTED" in CudaVmm.problem(
        ["cuda:0"], PlayedDriver(cuMemImportFromShareableHandle=NOT_PERMITTED)
    )


def test_a_driver_that_does_not_start_is_named() -> None:
    with pytest.raises(CudaError, match="refused cuInit: CUDA_ERROR_NOT_SUPPORTED"):
        Driver(PlayedDriver(cuInit=NOT_SUPPORTED))


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has the driver")
def test_a_machine_without_the_driver_is_told_so() -> None:
    with pytest.raises(ModelLoadError, match="no NVIDIA driver"):
        CudaVmm()
