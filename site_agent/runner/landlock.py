"""Landlock: which files a runner may read, and that it may reach nothing by TCP, abstract sockets or signals (where the kernel can)."""

from __future__ import annotations

import ctypes
import os
import struct

from edif_mesh.errors import SandboxError

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_PATH_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIR, _IOCTL_DEV = 1 << 1, 1 << 2, 1 << 3, 1 << 15
_HANDLED_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP, _SCOPES = 3, 3

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """Return the kernel's Landlock ABI, 0 when there is none. 4 closes TCP, 6 signals and abstract sockets."""
    return max(0, int(_libc.syscall(_CREATE, None, 0, 1)))


def restrict_files(readable: tuple[str, ...], devices: tuple[str, ...] = ()) -> None:
    """Let the calling thread, and all that it starts, read files below `readable` and do nothing else with any file.

    Of the device files `devices` it may also write and make requests (ioctl, which ABI 5 restricts). Needs no_new_privs. A folder that is not there is left out. Raises SandboxError.
    """
    abi = landlock_abi()
    handled = _HANDLED_BY_ABI.get(abi, _HANDLED_BY_ABI[5])
    attributes = struct.pack("QQQ", handled, _TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    attributes = attributes[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = _libc.syscall(_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        raise SandboxError(f"The kernel refused a Landlock ruleset: {os.strerror(ctypes.get_errno())}.")
    on_device = (_READ_FILE | _WRITE_FILE | _IOCTL_DEV) & handled
    rules = [(path, (_READ_FILE | _READ_DIR) if os.path.isdir(path) else _READ_FILE) for path in readable]
    for path, rights in (*rules, *((device, on_device) for device in devices)):
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rule = struct.pack("=Qi", rights, handle)
        if _libc.syscall(_ADD, ruleset, _PATH_BENEATH, rule, 0) != 0:
            raise SandboxError(f"The kernel refused a Landlock rule: {os.strerror(ctypes.get_errno())}.")
        os.close(handle)
    if _libc.syscall(_RESTRICT, ruleset, 0) != 0:
        raise SandboxError(f"The kernel refused to restrict the runner: {os.strerror(ctypes.get_errno())}.")
    os.close(ruleset)
