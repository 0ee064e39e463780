"""Segments in the memory of NVIDIA GPUs: by virtual memory management (runners map read-only), or by CUDA IPC (they could write).

The first use of a store starts CUDA in its process, through the driver and so also for torch (same primary contexts). Nothing
is unmapped after `attach`: the end of a process gives all of it back. Not yet measured; see `cuda_driver`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from edif_mesh.errors import ModelLoadError
from site_agent.hosting.cuda_driver import (
    POSIX_FILE_DESCRIPTOR_SUPPORTED,
    PROT_READ,
    PROT_READWRITE,
    VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
    CudaError,
    Driver,
    load_library,
)
from site_agent.hosting.manifest import Segment
from site_agent.hosting.segments import Handle, Mapped

_NEEDED = (
    (VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "virtual memory management"),
    (POSIX_FILE_DESCRIPTOR_SUPPORTED, "export of memory as a descriptor"),
)


@dataclass(frozen=True, slots=True)
class _Made:
    segment: Segment
    handle: int
    address: int
    size: int


class CudaVmm:
    """Memory that is exported as a descriptor. Whoever attaches, the owner too, gets it read-only for the device."""

    def __init__(self, library: Any = None) -> None:
        self._driver = Driver(library or load_library())
        self._made: list[_Made] = []

    @classmethod
    def problem(cls, devices: list[str], library: Any = None) -> str:
        """Return why this kind cannot be used on `devices`, by trying it; empty when it can."""
        store = cls(library)
        driver = store._driver
        try:
            for device in devices:
                for attribute, what in _NEEDED:
                    if not driver.attribute(attribute, _number(device)):
                        return f"{device} has no {what}."
                store.create(Segment(device, 1))
                [(handle, descriptor)] = store.publish()
                try:
                    mapped = store.attach(handle, descriptor)
                finally:
                    os.close(descriptor)
                with driver.on(_number(device)):
                    driver.unmap(mapped.pointer, mapped.size_bytes)
        except ModelLoadError as error:
            return str(error)
        return ""

    def create(self, segment: Segment) -> Mapped:
        """As the port says; the size is rounded up to the device's granularity."""
        driver, number = self._driver, _number(segment.device)
        size = driver.rounded(segment.size_bytes, number)
        with driver.on(number):
            try:
                handle = driver.create(size, number)
            except CudaError as error:
                raise _explained(error, segment, size) from error
            try:
                address = driver.map(handle, size, number, PROT_READWRITE)
            except CudaError:
                driver.release(handle)
                raise
            self._made.append(_Made(segment, handle, address, size))
            driver.zero(address, size)
            driver.synchronize()
        return Mapped(address, size, segment.device)

    def publish(self) -> list[tuple[Handle, int]]:
        """As the port says: nobody has a writable mapping afterwards, not even this process."""
        published = []
        for made in self._made:
            with self._driver.on(_number(made.segment.device)):
                self._driver.synchronize()  # what filled it
                descriptor = self._driver.export(made.handle)
                os.set_inheritable(descriptor, False)
                self._driver.unmap(made.address, made.size)
                self._driver.release(made.handle)
            published.append((Handle(made.segment.device, made.size), descriptor))
        self._made.clear()
        return published

    def attach(self, handle: Handle, descriptor: int) -> Mapped:
        """As the port says: a write through this mapping is a fault of the device, which ends the process's use of it."""
        number = _number(handle.device)
        with self._driver.on(number):
            imported = self._driver.import_(descriptor)
            try:
                address = self._driver.map(imported, handle.size_bytes, number, PROT_READ)
            finally:
                self._driver.release(imported)  # the mapping keeps the memory
        return Mapped(address, handle.size_bytes, handle.device)


class CudaIpc:
    """Memory of its own allocation (not torch's, whose blocks are shared with other tensors), opened by a handle of 64 bytes.

    A process cannot open its own handle, so the owner goes on with the address that it made.
    """

    def __init__(self, library: Any = None) -> None:
        self._driver = Driver(library or load_library())
        self._made: list[tuple[Handle, Mapped]] = []

    def create(self, segment: Segment) -> Mapped:
        """As the port says; whole granules, so that the handle opens nothing else."""
        driver, number = self._driver, _number(segment.device)
        size = driver.rounded(segment.size_bytes, number)
        with driver.on(number):
            try:
                address = driver.allocate(size)
            except CudaError as error:
                raise _explained(error, segment, size) from error
            driver.zero(address, size)
            driver.synchronize()
            handle = Handle(segment.device, size, driver.ipc_handle(address).hex())
        mapped = Mapped(address, size, segment.device)
        self._made.append((handle, mapped))
        return mapped

    def publish(self) -> list[tuple[Handle, int]]:
        """As the port says, but this kind cannot be closed against writing: the weights check is what notices."""
        for _, mapped in self._made:
            with self._driver.on(_number(mapped.device)):
                self._driver.synchronize()
        return [(handle, -1) for handle, _ in self._made]

    def attach(self, handle: Handle, descriptor: int) -> Mapped:
        """As the port says."""
        for made, mapped in self._made:
            if made == handle:
                return mapped
        with self._driver.on(_number(handle.device)):
            address = self._driver.ipc_open(bytes.fromhex(handle.token))
        return Mapped(address, handle.size_bytes, handle.device)


def _number(device: str) -> int:
    kind, _, number = device.partition(":")
    if kind != "cuda":
        raise ModelLoadError(f"There is no memory of a GPU on {device}.")
    return int(number or 0)


def _explained(error: CudaError, segment: Segment, size: int) -> ModelLoadError:
    if error.name != "CUDA_ERROR_OUT_OF_MEMORY":
        return error
    return ModelLoadError(
        f"{segment.device} has not enough free memory for the next {size / 1e9:,.2f} GB of weights. Load the model in a smaller "
        "dtype, over more devices (device_map), or give another model's memory up."
    )
