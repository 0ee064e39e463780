"""What the kernel says of a runner: memory, processor time, threads. Nothing here is the runner's own word.

Memory is counted in two ways, because a fork shares pages with its host. `anonymous_bytes` sees at once what a job adds, and
never what it copies: a page of the weights that a job writes to was in its page tables before. `private_bytes` sees both;
reading it walks the page tables (some 10 ms a GB in small pages, next to nothing in large ones), so `Meter` reads it when the
page faults since the last time could have taken the job over its limit, and otherwise now and then.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, replace

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_KIB = 1024
_STATUS = ("VmRSS", "VmHWM", "RssAnon", "VmSwap", "Threads")
_SHARE = 50
"""An exact look may take one part in so many of the time between two."""
_LEAST_S = 1.0
_CHEAP_S = 0.005
_FEW_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Usage:
    """One cheap reading."""

    resident_bytes: int = 0
    peak_bytes: int = 0
    """The highest `resident_bytes` that the process ever had."""
    anonymous_bytes: int = 0
    """Not from files, also when swapped out; pages shared with the host count."""
    threads: int = 0
    cpu_ms: int = 0
    faults: int = 0
    """Page faults that needed no disk: each copied or added one page at most (large pages apart)."""


class Meter:
    """Reads one process; `start` marks what is not the job's. Closed by `close`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._exact = -1
        self._closing = threading.Lock()
        self._base, self._base_private, self._known_private = Usage(), 0, 0
        self._known_at, self._known = 0.0, Usage()
        self._cost_s = 0.0
        self.last = Usage()
        self.cpu_ms = self.memory_bytes = self.peak_bytes = 0

    def adopt(self, descriptor: int) -> None:
        """Take `/proc/self/smaps_rollup` as the runner itself has opened it, before it confined itself.

        Nobody else may open it then. Taken only when it is that of our process, as far as names tell: in a container with
        a /proc of its own the process has another number. What is there is the runner's at rest.
        """
        try:
            name = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            name = ""
        other_proc = not name.startswith("/proc/") and name.endswith("/smaps_rollup")
        if self._exact >= 0 or not (other_proc or name == f"/proc/{self.pid}/smaps_rollup"):
            os.close(descriptor)
            return
        self._exact = descriptor
        self._base_private = self._known_private = self._private_bytes() or 0

    def start(self) -> None:
        """The job begins: count from here."""
        self._base = self.last = self._known = read_usage(self.pid) or Usage()
        self._known_at = time.monotonic()

    def read(self) -> bool:
        """Read what is cheap and keep the highest; False when the process is gone."""
        usage = read_usage(self.pid)
        if usage is None:
            return False
        self.last, base = usage, self._base
        grown = usage.anonymous_bytes - base.anonymous_bytes
        self.cpu_ms = max(self.cpu_ms, usage.cpu_ms - base.cpu_ms)
        self.memory_bytes = max(0, grown, self._known_private - self._base_private)
        self.peak_bytes = max(self.peak_bytes, self.memory_bytes, self._peak_between())
        return True

    def should_look(self, limit_bytes: int) -> bool:
        """Whether an exact look is due, after `read`: the job may be over `limit_bytes`, or the last is long ago."""
        if self._exact < 0:
            return False
        since = time.monotonic() - self._known_at
        return self._at_most() > limit_bytes or since >= max(_LEAST_S, _SHARE * self._cost_s)

    def worth_a_last_look(self) -> bool:
        """Whether the job may have copied so much that its receipt would be wrong without an exact look."""
        return self._exact >= 0 and self._cost_s < _CHEAP_S and self._at_most() > self.peak_bytes + (32 << 20)

    def look(self) -> None:
        """Read what is exact. May run in a thread of its own."""
        began = time.monotonic()
        private = self._private_bytes()
        if private is None:
            return
        self._known_private, self._known, self._known_at = private, self.last, time.monotonic()
        self.memory_bytes = max(self.memory_bytes, private - self._base_private)
        self.peak_bytes = max(self.peak_bytes, self.memory_bytes)
        self._cost_s = self._known_at - began

    def final(self, cpu_ms: int, peak_bytes: int) -> None:
        """Take what the kernel told the host when the process had ended; both since its fork."""
        self.cpu_ms = max(self.cpu_ms, cpu_ms - self._base.cpu_ms)
        self.last = replace(self.last, peak_bytes=max(self.last.peak_bytes, peak_bytes))
        self.peak_bytes = max(self.peak_bytes, self._peak_between())

    def close(self) -> None:
        """Give the descriptor back; idempotent."""
        with self._closing:
            descriptor, self._exact = self._exact, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _peak_between(self) -> int:
        """What the job had between two readings, from the highest that was ever resident.

        That counts pages of files too. Those of libraries are few; weights that are mapped from a file are not the job's.
        """
        now, base = self.last, self._base
        if now.peak_bytes <= base.peak_bytes:
            return 0
        files = (now.resident_bytes - now.anonymous_bytes) - (base.resident_bytes - base.anonymous_bytes)
        return now.peak_bytes - base.resident_bytes - (files if files > _FEW_BYTES else 0)

    def _at_most(self) -> int:
        """What the job can have by now, if every page fault since the last exact look has copied a page."""
        added = max(0, self.last.anonymous_bytes - self._known.anonymous_bytes)
        copied = (self.last.faults - self._known.faults) * PAGE_BYTES
        return self._known_private - self._base_private + added + copied

    def _private_bytes(self) -> int | None:
        try:
            with self._closing:  # `close` may come while a thread reads: its number could be another file's by then
                descriptor = os.dup(self._exact) if self._exact >= 0 else -1
            text = _read_at_once(descriptor) if descriptor >= 0 else ""
        except OSError:  # the process is gone, or we have no free descriptor
            return None
        values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        try:
            return sum(int(values[name].split()[0]) for name in ("Private_Dirty", "SwapPss")) * _KIB
        except (KeyError, ValueError, IndexError):
            return None


def _read_at_once(descriptor: int) -> str:
    try:
        return os.pread(descriptor, 4096, 0).decode()
    finally:
        os.close(descriptor)


def read_usage(pid: int) -> Usage | None:
    """Return one reading of a process, or None when it has ended (a zombie has no memory)."""
    values: dict[str, int] = {}
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name in _STATUS:
                    values[name] = int(value.split()[0])
        with open(f"/proc/{pid}/stat") as file:
            faults = int(file.read().rpartition(")")[2].split()[7])
        cpu_ns = time.clock_gettime_ns(~pid << 3 | 2)  # CPU clock of another process, see clock_getcpuclockid(3)
    except (OSError, ValueError, IndexError):
        return None
    if len(values) < len(_STATUS):
        return None
    return Usage(
        resident_bytes=values["VmRSS"] * _KIB,
        peak_bytes=values["VmHWM"] * _KIB,
        anonymous_bytes=(values["RssAnon"] + values["VmSwap"]) * _KIB,
        threads=values["Threads"],
        cpu_ms=cpu_ns // 1_000_000,
        faults=faults,
    )
