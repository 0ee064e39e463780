"""GPUs for runners: what CUDA must still reach when a runner is confined, the job's share of a device, and its errors as sentences.

The files and requests listed here are those of NVIDIA's open kernel modules and of sandboxes that let CUDA through; no list is
documented as complete. What is missing fails closed: CUDA does not start, the runner says so, and no job runs. Not yet measured.
"""

from __future__ import annotations

import contextlib
import glob
import os
from dataclasses import replace

from site_agent.runner.confine import SandboxSettings

_DEVICES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia[0-9]*")
"""Not among them: `nvidia-modeset` and `nvidia-caps*` (displays, MIG's and fabric's administration)."""
_READ = (
    "/proc/driver/nvidia", "/proc/devices", "/proc/cpuinfo", "/proc/meminfo", "/proc/modules", "/proc/self",
    "/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/devices/system/memory", "/sys/bus/pci/devices",
    "/sys/devices/pci*", "/sys/module/nvidia", "/sys/module/nvidia_uvm",
)  # fmt: skip
_LIBRARIES = ("/usr/local/nvidia", "/usr/local/cuda*")
_UVM = "/dev/nvidia-uvm"


def for_cuda(settings: SandboxSettings) -> SandboxSettings:
    """Return `settings` with what CUDA needs of files and devices on this machine."""
    read = tuple(path for pattern in (*_READ, *_LIBRARIES) for path in sorted(glob.glob(pattern)))
    devices = tuple(path for pattern in _DEVICES for path in sorted(glob.glob(pattern)))
    return replace(settings, readable=(*settings.readable, *read), devices=devices)


def shown(settings: SandboxSettings) -> tuple[str, ...]:
    """Return what of the readable folders a file tree of its own can show: nothing of /proc, which it lies over."""
    return tuple(path for path in settings.readable if not f"{path}/".startswith("/proc/"))


def cuda_has_started(proc: int) -> bool:
    """Return whether this process has the unified memory device open, as every process has that has started CUDA.

    `proc` is a descriptor of its /proc.
    """
    folder = os.open("self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
    try:
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.readlink(name, dir_fd=folder) == _UVM:
                    return True
        return False
    finally:
        os.close(folder)


def limit_device_memory(memory_bytes: int) -> None:
    """Have torch refuse more than `memory_bytes` on each device of this process; shared weights do not count. A no-op without CUDA.

    A job can get around it (its own calls to the driver): the agent counts what the driver says (`device_usage`).
    """
    import torch

    if not torch.cuda.is_initialized():
        return
    for number in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(number).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total), number)


def ran_out_of_device_memory(error: BaseException) -> bool:
    """Whether torch could not allocate on a device, or a library could not."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = _said(error)
    return isinstance(error, RuntimeError) and ("CUDA out of memory" in said or "CUBLAS_STATUS_ALLOC_FAILED" in said)


def device_memory_sentence(memory_bytes: int, said: str) -> str:
    """Return what a job is told whose device memory ran out; `said` is torch's own text."""
    first = said.strip().split(". ")
    tried = next((f" {part.strip()}." for part in first if part.strip().startswith("Tried to allocate")), "")
    return (
        f"The job needed more memory on its GPU than its limit of {memory_bytes / 1e9:,.2f} GB (beyond the model's weights), or "
        f"than was free there.{tried} Keep or save less at once, move what you keep to the CPU, or order a higher memory_bytes."
    )


def fault_note(error: BaseException) -> str:
    """Return what to add to the traceback of a job that the GPU has stopped; empty for everything else."""
    said = _said(error)
    if "CUDA error" not in said or not any(
        word in said for word in ("illegal memory access", "unspecified launch failure")
    ):
        return ""
    return (
        "\n\nThe GPU refused an access to memory. The usual reason here: the model's weights are mapped read-only on this device, "
        "and the block changes them in place (an optimizer step, `p.data.add_`, `p.copy_`, `model.half()`). Edit a copy instead: "
        "`torch.func.functional_call(module, {name: changed}, args)`, `w = p.detach().clone()`, or change the module's output. "
        "Gradients with respect to activations, and reading weights, work."
    )


def _said(error: BaseException) -> str:
    """An error of a job may not even let itself be shown."""
    try:
        return str(error)
    except BaseException:
        return ""
