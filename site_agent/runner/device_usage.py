"""What a GPU's driver says of a runner's memory on it: the counterpart of `usage` for devices, read by the agent, never by the runner."""

from __future__ import annotations

from collections.abc import Callable

SLACK_BYTES = 1 << 30
"""Beyond a job's limit before it is killed: workspaces and kernels of libraries, and what torch holds in reserve. Not yet measured."""


class DeviceMeter:
    """Reads one process; `start` marks what is not the job's: its context, and the weights where a driver counts them."""

    def __init__(self, pid: int, used_bytes: Callable[[int], int | None]) -> None:
        """`used_bytes` returns what a process has on all devices; None where the driver does not say."""
        self._pid, self._used_bytes = pid, used_bytes
        self._base = 0
        self.memory_bytes = self.peak_bytes = 0

    def start(self) -> None:
        """The job begins: count from here."""
        self._base = self._used_bytes(self._pid) or 0

    def read(self) -> None:
        """Read and keep the highest; what cannot be read changes nothing. May run in a thread of its own."""
        used = self._used_bytes(self._pid)
        if used is not None:
            self.memory_bytes = max(0, used - self._base)
            self.peak_bytes = max(self.peak_bytes, self.memory_bytes)
