"""Confinement of one runner: what it takes from itself before it reads the first byte of a stranger's job.

Order: new session, death signal, descriptors, namespaces (only where they are allowed, never required), user id (only
where the dropped id can still read the interpreter), limits, no new privileges, Landlock, capabilities, not dumpable,
seccomp last. A sandbox that cannot be set up raises SandboxError and nothing runs. Python inside is *not* a boundary.

Where the agent runs as root and the interpreter lies in a folder that only root can read, the runner keeps its user id:
Landlock, the empty capability set and seccomp hold it then, and the profile says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from edif_mesh.errors import SandboxError
from site_agent.runner.seccomp import install_filter, supported

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_HANDLED_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
_CLONE_NEWNET, _CLONE_NEWIPC = 0x40000000, 0x08000000
_SIGKILL = 9
NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """What a runner may still reach. `readable` are folders it may read (interpreter, libraries, model)."""

    readable: tuple[str, ...]
    drop_to_uid: int | None = None
    namespaces: bool = False
    processes: int = 512
    """Threads, counted per user id by the kernel."""
    file_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Profile:
    """What holds on this machine; `name` goes into the advert."""

    name: str
    landlock_abi: int
    drop_to_uid: int | None
    namespaces: bool

    def sentence(self) -> str:
        """Return the profile for a person."""
        user = f"user id {self.drop_to_uid}" if self.drop_to_uid is not None else "the agent's user id"
        extra = ", own network and IPC namespaces" if self.namespaces else ""
        return f"{self.name}: Landlock ABI {self.landlock_abi}, seccomp, limits, {user}{extra}"


def interpreter_folders() -> tuple[str, ...]:
    """Return the folders that lazily imported modules and shared libraries come from."""
    candidates = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path}
    candidates |= {"/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/share/zoneinfo"}
    real = {os.path.realpath(path) for path in candidates if path and os.path.isdir(path)}
    return tuple(sorted(path for path in real if path not in ("/", "/root", os.path.expanduser("~"))))


def find_profile() -> Profile:
    """Return the strongest profile that this machine can hold; raises SandboxError when there is none."""
    abi = landlock_abi()
    if abi < 1:
        raise SandboxError(
            "This kernel has no Landlock (Linux 5.13 or newer, with `landlock` in its `lsm=` list). "
            "Runners cannot be confined, so this site runs nothing."
        )
    if not supported():
        raise SandboxError("There is no system call table for this processor, so this site runs nothing.")
    root = os.geteuid() == 0
    drop = NOBODY if root and _others_can_read((sys.executable, os.__file__, sys.prefix)) else None
    return Profile("base", abi, drop, namespaces=root and _can_unshare())


def settings_for(profile: Profile, readable: tuple[str, ...]) -> SandboxSettings:
    """Return the settings of a runner under `profile` that may also read the folders `readable`."""
    return SandboxSettings((*interpreter_folders(), *readable), profile.drop_to_uid, profile.namespaces)


def confine(settings: SandboxSettings, keep_descriptor: int) -> None:
    """Take everything from this process but its memory and `keep_descriptor`. Raises SandboxError."""
    os.setsid()
    _close_descriptors(keep_descriptor)
    if settings.namespaces and _libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC) != 0:
        raise SandboxError(f"The runner's own network namespace was refused: {os.strerror(ctypes.get_errno())}.")
    if settings.drop_to_uid is not None:
        os.setgroups([])
        os.setresgid(settings.drop_to_uid, settings.drop_to_uid, settings.drop_to_uid)
        os.setresuid(settings.drop_to_uid, settings.drop_to_uid, settings.drop_to_uid)
    _libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    _limit(settings)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise SandboxError("The kernel refused no_new_privs.")
    _landlock(settings.readable)
    _drop_capabilities()
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    install_filter()


def harden_parent() -> None:
    """Make the calling process unreadable for others of its user (ptrace, /proc/PID/mem)."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, for whatever reason."""
    _libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def landlock_abi() -> int:
    """Return the kernel's Landlock ABI, 0 when there is none."""
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1)))


def _close_descriptors(keep: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    limit = max(os.sysconf("SC_OPEN_MAX"), 4096)
    os.closerange(3, keep)
    os.closerange(keep + 1, limit)


def _limit(settings: SandboxSettings) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (settings.file_bytes, settings.file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    if settings.drop_to_uid is not None:
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NPROC, (settings.processes, settings.processes))


def _landlock(readable: tuple[str, ...]) -> None:
    abi = landlock_abi()
    handled = _HANDLED_BY_ABI.get(abi, _HANDLED_BY_ABI[5])
    network = 3 if abi >= 4 else 0  # bind and connect of TCP
    scoped = 3 if abi >= 6 else 0  # abstract sockets and signals to the outside
    attributes = struct.pack("QQQ", handled, network, scoped)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = _libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        raise SandboxError(f"The kernel refused a Landlock ruleset: {os.strerror(ctypes.get_errno())}.")
    for folder in readable:
        try:
            handle = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rule = struct.pack("=Qi", (_READ_FILE | _READ_DIR) if os.path.isdir(folder) else _READ_FILE, handle)
        if _libc.syscall(_LANDLOCK_ADD, ruleset, _LANDLOCK_PATH_BENEATH, rule, 0) != 0:
            raise SandboxError(f"The kernel refused a Landlock rule: {os.strerror(ctypes.get_errno())}.")
        os.close(handle)
    if _libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) != 0:
        raise SandboxError(f"The kernel refused to restrict the runner: {os.strerror(ctypes.get_errno())}.")
    os.close(ruleset)


def _drop_capabilities() -> None:
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    if _libc.capset(header, bytes(24)) != 0:
        raise SandboxError(f"The runner could not drop its capabilities: {os.strerror(ctypes.get_errno())}.")


def _others_can_read(paths: tuple[str, ...]) -> bool:
    for path in paths:
        real = Path(os.path.realpath(path))
        if any(not parent.stat().st_mode & 0o001 for parent in real.parents):
            return False
    return True


def _can_unshare() -> bool:
    child = os.fork()
    if child == 0:
        os._exit(0 if _libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC) == 0 else 1)
    return os.waitpid(child, 0)[1] == 0
