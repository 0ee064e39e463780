"""Namespaces around a host and its runners: what the kernel then does not even show them.

Three moments, because each is possible at its own time only:

- `enter`, first of all, while the process has one thread: a user namespace (where the agent is not root) and a pid
  namespace, in which the host is process 1. The process that was started stays behind as a waiter. When the host dies,
  for whatever reason, the kernel ends everything in its pid namespace, so no runner outlives it.
- `close_off`, when the model is loaded: network (not even loopback is up), IPC, and mounts: a new root that shows the
  folders that runners may read, read-only, and /dev/null; no /proc, no /sys, no home.
- `fork`: every runner is process 1 of a pid namespace of its own: it can name no process but itself. The host makes the
  namespace, forks into it, and steps back; no second process stays beside the runner.

Network, IPC and mounts are shared by the runners of one host: making and ending a network namespace costs milliseconds, and
nothing in them can be written or opened by a runner. The user namespace of a runner is its own (`confine`).
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from typing import NoReturn

from edif_mesh.domain.site import SandboxProfile
from edif_mesh.errors import SandboxError
from site_agent.runner.process import die_with_parent, harden_parent

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV = 4096, 16384, 1 << 18, 2, 4
_MNT_DETACH, _AT_RECURSIVE = 2, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DEVICES = ("/dev/null",)
_WORKSHOP = "/proc"
"""Where the new root is put together: a folder that every Linux has, in a mount namespace that nobody else sees."""

_libc = ctypes.CDLL(None, use_errno=True)


class Enclosure:
    """What a host puts around itself and its runners: nothing for BASE; under STRICT, which is around it already, what it may."""

    def __init__(self, profile: SandboxProfile) -> None:
        self.profile = profile
        self._active = profile is not SandboxProfile.BASE
        self._number = os.getpid() * 61
        self._own_pids = -1

    @property
    def active(self) -> bool:
        """Whether it uses namespaces; final once they have been entered."""
        return self._active

    def enter(self) -> None:
        """Go on in new user and pid namespaces, in a child of the calling process, which waits. Raises SandboxError."""
        if not self._active:
            return
        uid, gid = os.geteuid(), os.getegid()
        # Root needs no user namespace to make the others, and without one it can give every runner a user id of its own.
        if uid != 0 or _libc.unshare(_NEWPID) != 0:
            if self.profile is SandboxProfile.STRICT and _libc.unshare(_NEWUSER | _NEWPID) != 0:
                self._active = False  # the runtime allows no namespaces inside its own
                return
            if self.profile is SandboxProfile.NAMESPACED:
                _unshare(_NEWUSER | _NEWPID, "user and pid namespaces")
            _map_own_ids(uid, gid)
        child = os.fork()
        if child != 0:
            _wait_for(child)
        die_with_parent()
        self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def close_off(self, readable: tuple[str, ...], devices: tuple[str, ...] = ()) -> None:
        """Leave the machine's network, IPC and files, for good and with all later children. Raises SandboxError."""
        if self._active:
            _unshare(_NEWNS | _NEWNET | _NEWIPC, "mount, network and IPC namespaces")
            show_only(readable, devices)

    def fork(self) -> tuple[int, int]:
        """Fork, as `os.fork`, into a pid namespace of its own; also returns a number that tells this child from others.

        Raises SandboxError, OSError.
        """
        self._number += 1
        if not self._active:
            return os.fork(), self._number
        _unshare(_NEWPID, "a pid namespace for a runner")
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid != 0 and _libc.setns(self._own_pids, _NEWPID) != 0:
                os._exit(1)  # never fork another runner into this one's namespace
        return pid, self._number


def leave_users() -> None:
    """Enter a user namespace in which nobody is anybody: no capability of it reaches any file or process. Raises SandboxError.

    Possible while the process has one thread.
    """
    _unshare(_NEWUSER, "a user namespace for a runner")


def _unshare(flags: int, what: str) -> None:
    if _libc.unshare(flags) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise SandboxError(f"The kernel refused {what}: {reason}.")


def _map_own_ids(uid: int, gid: int) -> None:
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        raise SandboxError(f"The kernel refused to map the agent's user into a namespace: {error.strerror}.") from error


def _wait_for(child: int) -> NoReturn:
    """Hold nothing, wait, and end as the child has ended."""
    os.closerange(3, max(os.sysconf("SC_OPEN_MAX"), 4096))
    harden_parent()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)


# ------------------------------------------------------------------------------------------------------------- mounts


def show_only(readable: tuple[str, ...], devices: tuple[str, ...] = ()) -> None:
    """Make the folders and files `readable` all that there is, read-only, with the links that lead to them, and `devices`.

    For a process alone in its mount namespace. Raises SandboxError.
    """
    os.umask(0o022)  # the new folders are for runners, which may have another user id
    try:
        _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        shown = [path for path in readable if os.path.exists(path)]
        links = {link: target for path in shown for link, target in _links_on(path).items()}
        links |= {f"/{name}": os.readlink(f"/{name}") for name in os.listdir("/") if os.path.islink(f"/{name}")}
        _mount("tmpfs", _WORKSHOP, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
        tops = _tops({os.path.realpath(path) for path in shown})
        for path in tops:
            _make_place(path)
            _mount(path, _WORKSHOP + path, None, _MS_BIND | _MS_REC)
        for link, target in links.items():
            if not any(_below(link, top) for top in tops) and not os.path.lexists(_WORKSHOP + link):
                os.makedirs(os.path.dirname(_WORKSHOP + link), exist_ok=True)
                os.symlink(target, _WORKSHOP + link)
        for device in (*_DEVICES, *devices):
            _make_place(device)
        _set_attributes(_WORKSHOP, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
        for device in (*_DEVICES, *devices):
            _mount(device, _WORKSHOP + device, None, _MS_BIND)
            _set_attributes(_WORKSHOP + device, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NOEXEC)
        os.chdir(_WORKSHOP)
        if _libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b".") != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "/")
        if _libc.umount2(b".", _MNT_DETACH) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "the old root")
        os.chdir("/")
    except OSError as error:
        raise SandboxError(
            f"The kernel refused a file tree of its own to the runners: {error.strerror} ({error.filename})."
        ) from error


def _tops(paths: set[str]) -> list[str]:
    """Leave out what lies below another one."""
    found: list[str] = []
    for path in sorted(paths):
        if not any(_below(path, top) for top in found):
            found.append(path)
    return found


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")


def _links_on(path: str) -> dict[str, str]:
    """Return the symbolic links that are followed on the way to `path`, each under its real folder, with what it says."""
    links: dict[str, str] = {}
    here, rest = "/", [part for part in path.split("/") if part]
    while rest and len(links) < 40:
        step = os.path.join(here, rest.pop(0))
        if os.path.islink(step):
            links[step] = os.readlink(step)
            goal = os.path.normpath(os.path.join(here, links[step]))
            here, rest = "/", [*(part for part in goal.split("/") if part), *rest]
        else:
            here = step
    return links


def _make_place(path: str) -> None:
    """Make the mount point for `path` in the new root."""
    place = _WORKSHOP + path
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o600))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    names = [name.encode() if name is not None else None for name in (source, target, kind)]
    if _libc.mount(*names, ctypes.c_ulong(flags), data.encode() or None) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def _set_attributes(path: str, attributes: int) -> None:
    """Set mount attributes on all mounts at and below `path` (Linux 5.12)."""
    value = struct.pack("QQQQ", attributes, 0, 0, 0)
    if _libc.syscall(_MOUNT_SETATTR, -100, path.encode(), _AT_RECURSIVE, value, len(value)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
