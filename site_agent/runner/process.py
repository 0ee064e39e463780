"""What the agent, a host and a waiter ask of the kernel for themselves, and what a process of ours starts with."""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_THP_DISABLE = 1, 4, 41
_SIGKILL = 9

_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "TZ", "LD_LIBRARY_PATH", "TMPDIR")
_OURS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_libc = ctypes.CDLL(None, use_errno=True)


def harden_parent() -> bool:
    """Make the calling process unreadable for others of its user (ptrace, /proc/PID/mem); returns whether it is."""
    return bool(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


def take_small_pages() -> None:
    """Have this process get new memory in pages of 4 KiB only; what it shares with its parent stays as it is.

    Memory that was never used before comes slowly where the machine is a virtual one, and large pages are taken from that
    first: 300 MB cost a runner 50 to 760 ms, in small pages 105 to 125 ms.
    """
    _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, for whatever reason. A change of user id undoes it."""
    _libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def clean_environment() -> dict[str, str]:
    """Return what a host's environment begins with. It gets no secret: what it holds, every runner holds."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # A runtime around the host may not show the folder it was started in.
    paths = [_OURS, *kept.get("PYTHONPATH", "").split(os.pathsep)]
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def host_command(
    module: str, arguments: tuple[str, ...], runtime: tuple[str | tuple[str, ...], ...], folders: tuple[str, ...]
) -> list[str]:
    """Return the command that starts Python with `module`, inside the site's own `runtime` when there is one.

    A part of `runtime` that holds `{readable}` is repeated for each of `folders`, as `SiteConfig.sandbox_command` says.
    """
    command: list[str] = []
    for part in runtime:
        words = (part,) if isinstance(part, str) else part
        repeated = folders if any("{readable}" in word for word in words) else ("",)
        command += [word.replace("{readable}", folder) for folder in repeated for word in words]
    return [*command, sys.executable, "-m", module, *arguments]


def host_folders(readable: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a runtime must show to a host: Python itself, what its modules need, and `readable`, by every name."""
    names = {*readable, sys.prefix, sys.base_prefix, os.path.dirname(sys.executable), "/lib", "/lib64"}
    shown = {path for path in names if os.path.exists(path)}
    return tuple(sorted(shown | {os.path.realpath(path) for path in shown} - {"/"}))
