"""The few calls of NVIDIA's driver that sharing weights needs, by ctypes on `libcuda.so.1`; every result is checked.

Layouts and values are those of `cuda.h` (CUDA 11.2 and newer, 64-bit). Names with `_v2` are what the header's plain names mean.
Not yet run on a device: `tests/unit/test_cuda_driver.py` plays the library, `tests/gpu` needs the real one.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_void_p
from typing import Any

from edif_mesh.errors import ModelLoadError

CUDA_SUCCESS = 0
HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1
PROT_READ, PROT_READWRITE = 1, 3
VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, POSIX_FILE_DESCRIPTOR_SUPPORTED = 102, 103
IPC_HANDLE_BYTES = 64
_ALLOCATION_TYPE_PINNED, _LOCATION_TYPE_DEVICE = 1, 1
_GRANULARITY_RECOMMENDED = 1
_IPC_LAZY_ENABLE_PEER_ACCESS = 1


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", c_int), ("id", c_int))


class AllocationFlags(ctypes.Structure):
    """The unnamed part of CUmemAllocationProp."""

    _fields_ = (
        ("compression_type", c_ubyte),
        ("gpu_direct_rdma_capable", c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", c_ubyte * 4),
    )


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp: 32 bytes."""

    _fields_ = (
        ("type", c_int),
        ("requested_handle_types", c_int),
        ("location", Location),
        ("win32_handle_meta_data", c_void_p),
        ("flags", AllocationFlags),
    )


class AccessDescription(ctypes.Structure):
    """CUmemAccessDesc: 12 bytes."""

    _fields_ = (("location", Location), ("flags", c_int))


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle: 64 opaque bytes, passed by value."""

    _fields_ = (("reserved", c_ubyte * IPC_HANDLE_BYTES),)


_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuCtxSynchronize": (),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(AllocationProperties), c_int),
    "cuMemCreate": (POINTER(c_uint64), c_size_t, POINTER(AllocationProperties), c_ulonglong),
    "cuMemRelease": (c_uint64,),
    "cuMemExportToShareableHandle": (c_void_p, c_uint64, c_int, c_ulonglong),
    "cuMemImportFromShareableHandle": (POINTER(c_uint64), c_void_p, c_int),
    "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_ulonglong),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_ulonglong),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(AccessDescription), c_size_t),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemsetD8_v2": (c_uint64, c_ubyte, c_size_t),
    "cuIpcGetMemHandle": (POINTER(IpcHandle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), IpcHandle, c_uint),
}


class CudaError(ModelLoadError):
    """A call of the driver failed; `name` is its own, as CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, call: str, name: str, meaning: str) -> None:
        self.call, self.name = call, name
        super().__init__(f"The GPU's driver refused {call}: {name} ({meaning}).")


def load_library() -> Any:
    """Return NVIDIA's driver library; raises ModelLoadError where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ModelLoadError(f"There is no NVIDIA driver on this machine: {error}.") from error


class Driver:
    """The driver in this process, started. Devices are numbers as in `cuda:0`, in the order that torch has too."""

    def __init__(self, library: Any) -> None:
        """Start CUDA: from now on this process must not fork. Raises CudaError."""
        self._calls: dict[str, Any] = {}
        for name, arguments in _PROTOTYPES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
            self._calls[name] = function
        self._contexts: dict[int, c_void_p] = {}
        self._call("cuInit", 0)

    def device_count(self) -> int:
        """How many devices this process may use."""
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return count.value

    def attribute(self, attribute: int, number: int) -> int:
        """Return one attribute of a device."""
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), attribute, self._device(number))
        return value.value

    @contextlib.contextmanager
    def on(self, number: int) -> Iterator[None]:
        """Make a device's primary context, which is torch's too, the current one of this thread."""
        if number not in self._contexts:
            context = c_void_p()
            self._call("cuDevicePrimaryCtxRetain", byref(context), self._device(number))
            self._contexts[number] = context
        self._call("cuCtxPushCurrent_v2", self._contexts[number])
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def synchronize(self) -> None:
        """Wait until the current device has done what it was asked."""
        self._call("cuCtxSynchronize")

    # -------------------------------------------------------------------------------------- virtual memory management

    def rounded(self, size: int, number: int) -> int:
        """Return `size` as memory of a device can be had: a multiple of its granularity (2 MiB on those known)."""
        granularity = c_size_t()
        self._call(
            "cuMemGetAllocationGranularity", byref(granularity), byref(_exportable(self._device(number))), _GRANULARITY_RECOMMENDED
        )  # fmt: skip
        return max(1, -(-size // granularity.value)) * granularity.value

    def create(self, size: int, number: int) -> int:
        """Return a handle of `size` (rounded) bytes of a device that can be exported."""
        handle = c_uint64()
        self._call("cuMemCreate", byref(handle), size, byref(_exportable(self._device(number))), 0)
        return handle.value

    def export(self, handle: int) -> int:
        """Return a descriptor of the memory; it keeps the memory alive, also without the handle."""
        descriptor = c_int(-1)
        self._call(
            "cuMemExportToShareableHandle", byref(descriptor), handle, HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0
        )  # fmt: skip
        return descriptor.value

    def import_(self, descriptor: int) -> int:
        """Return a handle of memory that was exported; the descriptor stays the caller's."""
        handle = c_uint64()
        # The driver takes the number itself in the place of a pointer.
        self._call(
            "cuMemImportFromShareableHandle", byref(handle), c_void_p(descriptor), HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        )  # fmt: skip
        return handle.value

    def map(self, handle: int, size: int, number: int, access: int) -> int:
        """Map all of a handle's `size` bytes for the device alone, and return the address. What was begun is undone when it fails."""
        address = c_uint64()
        self._call("cuMemAddressReserve", byref(address), size, 0, 0, 0)
        mapped = False
        try:
            self._call("cuMemMap", address.value, size, 0, handle, 0)
            mapped = True
            description = AccessDescription(Location(_LOCATION_TYPE_DEVICE, self._device(number)), access)
            self._call("cuMemSetAccess", address.value, size, byref(description), 1)
        except CudaError:
            with contextlib.suppress(CudaError):
                if mapped:
                    self._call("cuMemUnmap", address.value, size)
                self._call("cuMemAddressFree", address.value, size)
            raise
        return address.value

    def unmap(self, address: int, size: int) -> None:
        """Undo `map`; the device must be done with it."""
        self._call("cuMemUnmap", address, size)
        self._call("cuMemAddressFree", address, size)

    def release(self, handle: int) -> None:
        """Give a handle back; the memory lives while it is mapped or a descriptor of it is open, anywhere."""
        self._call("cuMemRelease", handle)

    # ---------------------------------------------------------------------------------------------------- whole blocks

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes of the current device."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), size)
        return address.value

    def zero(self, address: int, size: int) -> None:
        """Fill with zeros on the current device."""
        self._call("cuMemsetD8_v2", address, 0, size)

    def ipc_handle(self, address: int) -> bytes:
        """Return what another process needs to open the whole allocation at `address`."""
        handle = IpcHandle()
        self._call("cuIpcGetMemHandle", byref(handle), address)
        return bytes(handle)

    def ipc_open(self, raw: bytes) -> int:
        """Return the address, on the current device, of another process's allocation."""
        address = c_uint64()
        handle = IpcHandle.from_buffer_copy(raw)
        self._call("cuIpcOpenMemHandle_v2", byref(address), handle, _IPC_LAZY_ENABLE_PEER_ACCESS)
        return address.value

    # ---------------------------------------------------------------------------------------------------------- inside

    def _device(self, number: int) -> int:
        device = c_int()
        self._call("cuDeviceGet", byref(device), number)
        return device.value

    def _call(self, name: str, *arguments: Any) -> None:
        result = self._calls[name](*arguments)
        if result != CUDA_SUCCESS:
            raise CudaError(name, self._text("cuGetErrorName", result), self._text("cuGetErrorString", result))

    def _text(self, call: str, result: int) -> str:
        text = c_char_p()
        known = self._calls[call](result, byref(text)) == CUDA_SUCCESS and text.value
        return text.value.decode(errors="replace") if known and text.value else f"result {result}"


def _exportable(device: int) -> AllocationProperties:
    return AllocationProperties(
        type=_ALLOCATION_TYPE_PINNED,
        requested_handle_types=HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        location=Location(_LOCATION_TYPE_DEVICE, device),
    )
