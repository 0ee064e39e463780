"""What this machine has: GPUs by NVML where there is a driver, else the CPU; versions without importing torch."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from edif_mesh.domain.site import Device, Versions


def devices() -> tuple[Device, ...]:
    """Return the GPUs, or the CPU as the only device when there is none; free memory is of this instant."""
    return gpus() or (cpu(),)


def gpus() -> tuple[Device, ...]:
    """Return the NVIDIA GPUs; empty without a driver."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def cuda_devices() -> int:
    """Return how many GPUs models can be loaded on: those of the driver, none where torch was built without CUDA."""
    with contextlib.suppress(PackageNotFoundError):
        return 0 if version("torch").endswith("+cpu") else len(gpus())
    return 0


class GpuProcesses:
    """The driver's count of processes' memory on the GPUs, as a function of the process id; opened at the first question."""

    def __init__(self) -> None:
        self._nvml: Any = None

    def __call__(self, pid: int) -> int | None:
        """Return the bytes that process `pid` has on all GPUs, 0 when it has none, None when the driver does not say.

        Process ids are the driver's, those of the machine: in a container with its own, nothing is found.
        """
        try:
            import pynvml
        except ImportError:
            return None
        try:
            if self._nvml is None:
                pynvml.nvmlInit()
                self._nvml = pynvml
            total = 0
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    if process.pid == pid:
                        if process.usedGpuMemory is None:
                            return None
                        total += int(process.usedGpuMemory)
            return total
        except pynvml.NVMLError:
            return None


def cpu() -> Device:
    """Return the processor with the machine's memory."""
    memory = psutil.virtual_memory()
    return Device("cpu", _processor_name(), int(memory.total), int(memory.available))


def free_memory_bytes() -> int:
    """Return how much memory new processes could take now; a control group's limit counts where it is lower."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return max(0, min(available, limit - used))
    return available


def memory_bytes() -> int:
    """Return how much memory this machine has, or lets this process's control group have where that is less."""
    total = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def versions() -> Versions:
    """Return the versions that decide whether a payload can be opened here; empty where a package is missing."""
    return Versions(
        python=platform.python_version(),
        nnsight=_version("nnsight"),
        torch=_version("torch"),
        transformers=_version("transformers"),
        edif=_version("edif-mesh"),
    )


def _gpu(pynvml: Any, index: int) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Device("cuda", name.decode() if isinstance(name, bytes) else str(name), int(memory.total), int(memory.free))


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"


def _version(package: str) -> str:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""
