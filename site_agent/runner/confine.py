"""Confinement of one runner: what it takes from itself before it reads the first byte of a stranger's job.

Order: new session, descriptors, user id, capabilities, death signal, limits, no new privileges, Landlock, not dumpable,
seccomp last. Where namespaces are allowed (they are never required), the host itself has left the machine's network before
the first fork. A sandbox that cannot be set up raises SandboxError
and nothing runs. Python inside is *not* a boundary.

User id. Where the agent runs as root, every runner gets an id of its own, so that neither the agent nor another runner is a
process "of the same user". Modules are imported lazily all through torch and transformers, and the interpreter may lie
under a folder that only root can enter (a home of root): the runner then keeps one capability, CAP_DAC_READ_SEARCH, which
gives it no more than root's own files gave it, and Landlock still limits every read to the folders listed. Where the agent
is not root, runners have its user id; Landlock, seccomp and non-dumpable processes keep them apart.
"""

from __future__ import annotations

import ctypes
import os
import resource
import ssl
import struct
import sys
from collections.abc import Callable
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
_PR_SET_KEEPCAPS, _CAP_DAC_READ_SEARCH = 8, 2
_SIGKILL = 9
_FIRST_UID, _UIDS = 61_184, 4_096
"""Ids that belong to nobody, low enough to be mapped in a container."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """What a runner may still reach. `readable` are folders it may read (interpreter, libraries, model)."""

    readable: tuple[str, ...]
    own_uid: bool = False
    search: bool = False
    """Keep CAP_DAC_READ_SEARCH: the interpreter lies in a folder that only root can enter."""
    namespaces: bool = False
    """The host leaves the machine's network and IPC before it forks."""
    threads: int = 512
    """Counted per user id by the kernel, so it is set with `own_uid` only; the supervisor counts them in any case."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What holds on this machine; `name` goes into the advert."""

    name: str
    landlock_abi: int
    own_uid: bool
    search: bool
    namespaces: bool

    def sentence(self) -> str:
        """Return the profile for a person."""
        user = "a user id of its own" if self.own_uid else "the agent's user id"
        extra = ", no network but an empty one, no IPC with others" if self.namespaces else ""
        return f"{self.name}: Landlock ABI {self.landlock_abi}, seccomp, limits, {user}{extra}"


def interpreter_folders() -> tuple[str, ...]:
    """Return the folders that lazily imported modules and shared libraries come from.

    Any other folder on `sys.path` may hold what it likes (keys, in the folder an agent was started in): of those only our
    own packages are listed.
    """
    installed = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.__file__)}
    installed |= {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")}
    installed |= {"/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/share/zoneinfo"}
    # The public certificates of authorities: huggingface_hub reads them even to find an adapter in the local cache.
    verify = ssl.get_default_verify_paths()
    certificates = {"/etc/ssl/certs", "/usr/share/ca-certificates", verify.openssl_capath, verify.openssl_cafile}
    ours = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    installed |= {os.path.join(ours, name) for name in ("edif_mesh", "site_agent")}
    real = {os.path.realpath(path) for path in installed if os.path.isdir(path)}
    real |= {os.path.realpath(path) for path in certificates if os.path.exists(path)}
    return tuple(sorted(real - {"/", "/root", "/home", os.path.expanduser("~")}))


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
    search = root and not _others_can_read((sys.executable, os.__file__, *interpreter_folders()))
    own_uid = root and _can(lambda: _take_own_uid(search))
    namespaces = root and _can(leave_network)
    return Profile("namespaced" if namespaces else "base", abi, own_uid, own_uid and search, namespaces)


def settings_for(profile: Profile, readable: tuple[str, ...]) -> SandboxSettings:
    """Return the settings of a runner under `profile` that may also read the folders `readable`."""
    return SandboxSettings((*interpreter_folders(), *readable), profile.own_uid, profile.search, profile.namespaces)


def confine(settings: SandboxSettings, keep_descriptor: int) -> None:
    """Take everything from this process but its memory and `keep_descriptor`. Raises SandboxError."""
    os.setsid()
    _close_descriptors(keep_descriptor)
    if settings.own_uid:
        _take_own_uid(settings.search)
    else:
        _keep_capabilities(0)
    _libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)  # a change of user id has cleared it
    _limit(settings)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise SandboxError("The kernel refused no_new_privs.")
    _landlock(settings.readable)
    if _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise SandboxError("The runner could not be made unreadable for others.")
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
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    if settings.own_uid:
        resource.setrlimit(resource.RLIMIT_NPROC, (settings.threads, settings.threads))


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


def leave_network() -> None:
    """Enter new network and IPC namespaces, for good and with all later children. Raises SandboxError.

    One for a host and all its runners: making and ending one costs milliseconds, and no runner may open a socket anyway.
    """
    if _libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC) != 0:
        raise SandboxError(f"An own network namespace was refused: {os.strerror(ctypes.get_errno())}.")


def _take_own_uid(search: bool) -> None:
    """Become a user that nobody else is, with no capability but, for `search`, CAP_DAC_READ_SEARCH."""
    uid = _FIRST_UID + os.getpid() % _UIDS
    _drop_bounding_set()
    try:
        _libc.prctl(_PR_SET_KEEPCAPS, int(search), 0, 0, 0)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise SandboxError(f"The runner could not take a user id of its own: {error.strerror}.") from error
    _keep_capabilities(1 << _CAP_DAC_READ_SEARCH if search else 0)


def _drop_bounding_set() -> None:
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break


def _keep_capabilities(kept: int) -> None:
    """Drop all capabilities but the bits `kept`, from every set (bits 0 to 31)."""
    _drop_bounding_set()
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    if _libc.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0)) != 0:
        raise SandboxError(f"The runner could not drop its capabilities: {os.strerror(ctypes.get_errno())}.")


def _others_can_read(paths: tuple[str, ...]) -> bool:
    for path in paths:
        real = Path(os.path.realpath(path))
        folders = (*real.parents, real) if real.is_dir() else real.parents
        if any(not folder.stat().st_mode & 0o001 for folder in folders):
            return False
    return True


def _can(action: Callable[[], None]) -> bool:
    """Return whether `action` succeeds, tried in a child of its own."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0
