"""Confinement of one runner: what it takes from itself before it reads the first byte of a stranger's job.

Two halves. `withdraw` leaves what a process has: session, descriptors, user id, user namespace, capabilities, resources.
`seal` forbids what it may ask for: no new privileges, Landlock, not dumpable, seccomp last. Pid, network, IPC and mount
namespaces are the host's to make, before and while it forks (`namespaces`). A sandbox that cannot be set up raises
SandboxError and nothing runs. Python inside is *not* a boundary.

User id. Where the agent runs as root, every runner gets an id of its own, so that neither the agent nor another runner is a
process "of the same user". Modules are imported lazily all through torch and transformers, and the interpreter may lie
under a folder that only root can enter (a home of root). Under NAMESPACED a mount leads past such a folder. Under BASE the
runner then keeps one capability, CAP_DAC_READ_SEARCH, which gives it no more than root's own files gave it, and Landlock
still limits every read to the folders listed. Where the agent is not root, runners have its user id; Landlock, seccomp and
non-dumpable processes keep them apart.
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
from site_agent.runner.landlock import landlock_abi, restrict_files
from site_agent.runner.namespaces import leave_users
from site_agent.runner.process import die_with_parent, harden_parent
from site_agent.runner.seccomp import install_filter, supported

__all__ = ["SandboxSettings", "confine", "die_with_parent", "harden_parent", "settings_for"]

_PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS = 8, 38
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
_CAP_DAC_READ_SEARCH = 2
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
    """The host is in namespaces of its own; the runner leaves the host's user namespace too."""
    threads: int = 512
    """Counted per user id by the kernel, so it is set with `own_uid` only; the supervisor counts them in any case."""
    devices: tuple[str, ...] = ()
    """Device files that it may open, write and make requests of: GPUs (`devices.for_cuda`)."""


def demand_kernel() -> None:
    """Raise SandboxError, with what to change, where no runner can be confined at all."""
    if landlock_abi() < 1:
        raise SandboxError("This kernel has no Landlock (Linux 5.13 or newer, with `landlock` in its `lsm=` list).")
    if not supported():
        raise SandboxError("There is no system call table for this processor.")


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


def settings_for(readable: tuple[str, ...], *, namespaces: bool) -> SandboxSettings:
    """Return the settings of this process's later children, which may also read the folders `readable`.

    Called after `Enclosure.enter`, with its `active`, while the process has one thread. Raises SandboxError.
    """
    demand_kernel()
    folders = interpreter_folders()
    own_uid = os.geteuid() == 0 and can(lambda: _take_own_uid(0, search=False))
    search = False
    if own_uid and namespaces:
        _demand_open(folders)
    elif own_uid:
        search = not _others_can_enter((sys.executable, os.__file__, *folders))
    return SandboxSettings((*folders, *readable), own_uid, search, namespaces)


def confine(
    settings: SandboxSettings,
    keep_descriptor: int,
    number: int = 0,
    *,
    prepare: Callable[[], object] | None = None,
    borrowed: tuple[int, ...] = (),
) -> None:
    """Take everything from this process but its memory and `keep_descriptor`. Raises SandboxError, and what `prepare` raises.

    `number` tells runners that live at once apart; by default the process id does. `prepare` runs when only the system calls are
    still open, with the descriptors `borrowed`, which are then closed: threads that it starts are confined like this one. (Landlock
    and user namespaces hold for one thread and those that it starts later; the filter of system calls for all there are.)
    """
    withdraw(settings, keep_descriptor, number, borrowed)
    if prepare is None:
        seal(settings)
        return
    seal_files(settings)
    prepare()
    for descriptor in borrowed:
        os.close(descriptor)
    seal_calls(settings)


def withdraw(settings: SandboxSettings, keep_descriptor: int, number: int = 0, borrowed: tuple[int, ...] = ()) -> None:
    """The first half of `confine`: leave session, descriptors, user, capabilities; limit resources. Raises SandboxError."""
    os.setsid()
    _close_descriptors(keep_descriptor, *borrowed)
    if settings.own_uid:
        _take_own_uid(number or os.getpid(), search=settings.search)
    if settings.namespaces:
        leave_users()
    _keep_capabilities(1 << _CAP_DAC_READ_SEARCH if settings.search else 0)
    die_with_parent()  # a change of user id has cleared it
    _limit(settings)


def seal(settings: SandboxSettings) -> None:
    """The second half of `confine`: forbid files, system calls, being looked into. Raises SandboxError."""
    seal_files(settings)
    seal_calls(settings)


def seal_files(settings: SandboxSettings) -> None:
    """Forbid files and new privileges to this thread and all that it starts. Raises SandboxError."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise SandboxError("The kernel refused no_new_privs.")
    restrict_files(settings.readable, settings.devices)


def seal_calls(settings: SandboxSettings) -> None:
    """Forbid system calls and being looked into to all threads of this process. Raises SandboxError."""
    if not harden_parent():
        raise SandboxError("The runner could not be made unreadable for others.")
    install_filter(devices=bool(settings.devices))


def can(action: Callable[[], None]) -> bool:
    """Return whether `action` succeeds, tried in a child of its own; for a process with one thread."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def _close_descriptors(*keep: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    start = 3
    for number in sorted(keep):
        os.closerange(start, number)
        start = number + 1
    os.closerange(start, max(os.sysconf("SC_OPEN_MAX"), 4096))


def _limit(settings: SandboxSettings) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
    if settings.own_uid:
        resource.setrlimit(resource.RLIMIT_NPROC, (settings.threads, settings.threads))


# -------------------------------------------------------------------------------------------- user and capabilities


def _take_own_uid(number: int, *, search: bool) -> None:
    """Become a user that nobody else is, with no capability but, for `search`, CAP_DAC_READ_SEARCH."""
    uid = _FIRST_UID + number % _UIDS
    _drop_bounding_set()
    try:
        _libc.prctl(_PR_SET_KEEPCAPS, int(search), 0, 0, 0)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise SandboxError(f"The runner could not take a user id of its own: {error.strerror}.") from error


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


def _others_can_enter(paths: tuple[str, ...]) -> bool:
    for path in paths:
        real = Path(os.path.realpath(path))
        folders = (*real.parents, real) if real.is_dir() else real.parents
        if any(not folder.stat().st_mode & 0o001 for folder in folders):
            return False
    return True


def _demand_open(folders: tuple[str, ...]) -> None:
    """Raise SandboxError when a user without rights could not read the folders and the modules in them.

    The way to a folder does not matter here: a mount leads past it.
    """
    libraries = {os.path.dirname(os.path.realpath(os.__file__))}
    for folder in folders:
        if folder in libraries or os.path.basename(folder) in ("site-packages", "dist-packages"):
            modules = [entry.path for entry in os.scandir(folder) if entry.is_dir() or entry.name.endswith(".py")]
        else:
            modules = []
        for path in (folder, *modules):
            wanted = 0o005 if os.path.isdir(path) else 0o004
            if os.stat(path).st_mode & wanted != wanted:
                raise SandboxError(
                    f"Runners have a user id of their own and could not read {path}: chmod -R o+rX {path}"
                )
