"""What the self-test tries from inside: forbidden things, each of which must be refused, at each layer without the next.

Run by `selftest` as `python -m site_agent.runner.probes FD PROFILE`, on the same path as a model host: the same
enclosure, the same fork, the same `confine`. Several children try, so that one layer cannot hide that another is open:

- `runtime` (STRICT): withdrawn, in what the site's own runtime is by itself;
- `walls` (NAMESPACED): withdrawn, in all our namespaces, and nothing sealed;
- `files`: Landlock alone;
- `sealed`: confined as a runner is.

Each says what got through, one JSON object a line; the last one then waits to be looked at, and killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edif_mesh.domain.site import SandboxProfile
from edif_mesh.errors import SandboxError
from site_agent.runner.confine import SandboxSettings, confine, settings_for, withdraw
from site_agent.runner.landlock import landlock_abi, restrict_files
from site_agent.runner.namespaces import Enclosure
from site_agent.runner.process import die_with_parent

_REFUSALS = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})
_ABSENT = _REFUSALS | {
    errno.ENOENT,
    errno.ESRCH,
    errno.EROFS,
    errno.ECONNREFUSED,
    errno.ENETUNREACH,
    errno.EADDRNOTAVAIL,
}
_FAMILIES = ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG")

NAMESPACES = ("net", "ipc", "mnt", "pid", "user")
LAYERS = {
    SandboxProfile.BASE: ("files", "sealed"),
    SandboxProfile.NAMESPACED: ("walls", "files", "sealed"),
    SandboxProfile.STRICT: ("runtime", "files", "sealed"),
}

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Bait:
    """What the agent has laid out for its self-test: things of its own that a runner must not reach."""

    canary: str
    """A file that only the agent may read."""
    folder: str
    """Where the agent may write."""
    port: int
    """A TCP port on which it listens."""
    abstract: str
    """The name of an abstract socket on which it listens."""
    agent: int
    """Its process id."""
    readable: tuple[str, ...] = ()


Probe = tuple[str, Callable[[], object]]


def main() -> None:
    """Try everything and report; never returns."""
    die_with_parent()
    control, profile = socket.socket(fileno=int(sys.argv[1])), SandboxProfile(sys.argv[2])
    try:
        bait = Bait(**json.loads(control.recv(64 << 10)))
        enclosure = Enclosure(profile)
        own = os.open(
            "/proc/self/ns", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        )  # open to the end: no child may hold it
        if profile is SandboxProfile.STRICT:
            _say_namespaces(control, own)
            plain = SandboxSettings(bait.readable)
            _child(Enclosure(SandboxProfile.BASE).fork, control, lambda n: _walls(control, plain, bait, n, "runtime"))
        enclosure.enter()
        settings = settings_for(bait.readable, namespaces=enclosure.active)
        if profile is not SandboxProfile.STRICT:
            os.close(own)
            own = os.open("/proc/self/ns", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        enclosure.close_off(settings.readable)
        if profile is not SandboxProfile.STRICT:
            _say_namespaces(control, own)
        outside = {"agent": bait.agent, "host": os.getpid()}
        if profile is SandboxProfile.NAMESPACED:
            _child(enclosure.fork, control, lambda n: _walls(control, settings, bait, n, "walls"))
        _child(enclosure.fork, control, lambda n: _files(control, settings, bait))
        _child(enclosure.fork, control, lambda n: _sealed(control, settings, bait, outside, n))
        _say(control, {"end": True})
    except (SandboxError, OSError) as error:
        _say(control, {"error": str(error)})
    os._exit(0)


def _say_namespaces(control: socket.socket, folder: int) -> None:
    _say(control, {"namespaces": {name: os.readlink(name, dir_fd=folder) for name in NAMESPACES}})


def _child(fork: Callable[[], tuple[int, int]], control: socket.socket, work: Callable[[int], None]) -> None:
    reader, writer = os.pipe()
    pid, number = fork()
    if pid == 0:
        status = 1
        try:
            die_with_parent()
            os.close(writer)
            os.read(reader, 1)  # until the agent has been given our pidfd: what we say next is about that process
            work(number)
            status = 0
        except (SandboxError, OSError) as error:
            with contextlib.suppress(OSError):
                _say(control, {"error": str(error)})
        finally:
            os._exit(status)
    pidfd = os.pidfd_open(pid)
    socket.send_fds(control, [json.dumps({"child": pid}).encode()], [pidfd])
    for descriptor in (pidfd, reader, writer):
        os.close(descriptor)
    _, status = os.waitpid(pid, 0)
    _say(control, {"ended": os.waitstatus_to_exitcode(status)})


def _say(control: socket.socket, message: dict[str, Any]) -> None:
    control.sendall(json.dumps(message).encode())


# ------------------------------------------------------------------------------------------------------------ layers


def _walls(control: socket.socket, settings: SandboxSettings, bait: Bait, number: int, layer: str) -> None:
    withdraw(settings, control.fileno(), number)
    probes: list[Probe] = [
        ("read a file of the agent", lambda: _read(bait.canary)),
        ("see that a file of the agent is there", lambda: os.stat(bait.canary)),
        ("write where the agent may", lambda: _write(bait.folder)),
        ("write to the root folder", lambda: _write("/")),
        ("reach a port on this machine", lambda: _connect(bait.port)),
        ("reach an abstract socket of the agent", lambda: _connect_abstract(bait.abstract)),
        ("find the agent's process", lambda: _same_process(bait.agent)),
        ("see the machine in /sys", lambda: os.listdir("/sys")),
        ("see the network's interfaces", _foreign_interface),
        ("mount", lambda: _call("mount", b"none", b"/", b"tmpfs", ctypes.c_ulong(0), None)),
    ]
    if settings.namespaces:  # a runtime around us may show its own processes
        probes.append(("see processes", lambda: os.listdir("/proc")))
    _say(control, {"layer": layer, "tried": len(probes), "through": _tried(probes, _ABSENT)})


def _files(control: socket.socket, settings: SandboxSettings, bait: Bait) -> None:
    if _libc.prctl(38, 1, 0, 0, 0) != 0:
        raise SandboxError("The kernel refused no_new_privs.")
    restrict_files(settings.readable)
    probes: list[Probe] = [
        ("read a file of the agent", lambda: _read(bait.canary)),
        ("read /etc/passwd", lambda: _read("/etc/passwd")),
        ("list the root folder", lambda: os.listdir("/")),
        ("list the agent's folder", lambda: os.listdir(bait.folder)),
        ("write where the agent may", lambda: _write(bait.folder)),
        ("delete a file of the agent", lambda: os.unlink(bait.canary)),
        ("make a folder", lambda: os.mkdir(f"{bait.folder}/made-by-a-runner")),
        ("read its parent's environment", lambda: _read(f"/proc/{bait.agent}/environ")),
    ]
    if landlock_abi() >= 4:
        probes.append(("reach a port on this machine", lambda: _connect(bait.port)))
    if landlock_abi() >= 6:
        probes.append(("reach an abstract socket of the agent", lambda: _connect_abstract(bait.abstract)))
        probes.append(("signal the agent", lambda: os.kill(bait.agent, 0)))
    _say(control, {"layer": "files", "tried": len(probes), "through": _tried(probes, _ABSENT)})


def _sealed(
    control: socket.socket, settings: SandboxSettings, bait: Bait, outside: dict[str, int], number: int
) -> None:
    confine(settings, control.fileno(), number)
    probes: list[Probe] = [
        ("read a file of the agent", lambda: _read(bait.canary)),
        ("write where the agent may", lambda: _write(bait.folder)),
        ("write to /tmp", lambda: _write("/tmp")),
        ("write beside the library", lambda: os.close(os.open(os.__file__, os.O_RDWR))),
        ("list processes", lambda: os.listdir("/proc")),
        ("run a program", lambda: os.execv(sys.executable, [sys.executable, "-c", "pass"])),
        ("fork", _fork),
        ("change its user id", lambda: os.setresuid(0, 0, 0)),
        ("trace a process", lambda: _call("ptrace", ctypes.c_long(16), ctypes.c_long(outside["host"]), None, None)),
        ("mount", lambda: _call("mount", b"none", b"/", b"tmpfs", ctypes.c_ulong(0), None)),
        ("enter a user namespace", lambda: _call("unshare", 0x10000000)),
        ("anonymous files that can be executed", lambda: os.memfd_create("x")),
        ("be looked into again", lambda: _call("prctl", 4, 1, 0, 0, 0)),
        ("open a pidfd", lambda: os.pidfd_open(outside["host"])),
        ("io_uring", lambda: _system_call(425, 425, 8, bytes(120))),
        ("bpf", lambda: _system_call(321, 280, 0, bytes(64), 64)),
        ("the kernel's keys", lambda: _system_call(250, 219, 0, -3, 0, 0, 0)),
        ("socketpair", socket.socketpair),
    ]
    probes += [(f"a socket of {name}", lambda name=name: _socket(name)) for name in _FAMILIES]  # type: ignore[misc]
    for who, pid in outside.items():
        probes += [
            (f"signal the {who}", lambda pid=pid: os.kill(pid, 0)),  # type: ignore[misc]
            (f"read the {who}'s environment", lambda pid=pid: _read(f"/proc/{pid}/environ")),  # type: ignore[misc]
            (f"read the {who}'s memory", lambda pid=pid: _read(f"/proc/{pid}/mem")),  # type: ignore[misc]
            (f"limit the {who}", lambda pid=pid: _limit(pid)),  # type: ignore[misc]
        ]
    held = [number for number in range(256) if number > 2 and number != control.fileno() and _open(number)]
    through = _tried(probes, _ABSENT)
    through += [f"hold descriptor {number}" for number in held]
    _say(control, {"layer": "sealed", "tried": len(probes) + 1, "through": through})
    control.recv(1)  # looked at meanwhile, and killed


# ------------------------------------------------------------------------------------------------------------- trying


def _tried(probes: list[Probe], refusals: frozenset[int]) -> list[str]:
    """Return the names of the probes that did anything but be refused."""
    through = []
    for name, probe in probes:
        try:
            probe()
        except OSError as error:
            if error.errno in refusals:
                continue
            through.append(f"{name} ({error.strerror or error})")
        except Exception as error:
            through.append(f"{name} ({type(error).__name__}: {error})")
        else:
            through.append(name)
    return through


def _read(path: str) -> None:
    with open(path, "rb") as file:
        file.read(1)


def _write(folder: str) -> None:
    path = f"{folder}/made-by-a-runner"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    os.unlink(path)


def _connect(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.connect(("127.0.0.1", port))


def _connect_abstract(name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(f"\0{name}")


def _same_process(pid: int) -> None:
    """Refused when there is no such process here, or when it is this one or its only neighbour, by another count."""
    if pid in (os.getpid(), os.getppid()):
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    os.kill(pid, 0)


def _foreign_interface() -> None:
    if [name for _, name in socket.if_nameindex() if name != "lo"]:
        return
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))


def _socket(family: str) -> None:
    number = getattr(socket, family, None)
    if number is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    socket.socket(number, socket.SOCK_SEQPACKET if family == "AF_ALG" else socket.SOCK_STREAM).close()


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _limit(pid: int) -> None:
    if pid == os.getpid():
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    _system_call(302, 261, pid, 7, None, bytes(16))


def _open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _system_call(x86_64: int, aarch64: int, *arguments: Any) -> None:
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if _libc.syscall(x86_64 if platform.machine() == "x86_64" else aarch64, *values) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    main()
