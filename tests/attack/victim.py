"""The victim: the attempts of the corpus in processes that nothing confines, so that each does its harm.

    python -m tests.attack.victim FOLDER     prints {"attempt": {"outcome": ..., "killed": [...]}}

It leaves the machine first: user (when not root), mount, pid, network, IPC and UTS namespaces of its own, so that what
escapes hits sleepers and listeners made for it. Each attempt runs in a forked process with bounded memory and time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from tests.attack.corpus import EVERY, Attempt, source

_libc = ctypes.CDLL(None, use_errno=True)
_NEWUSER, _OTHERS = 0x10000000, 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
_WITHIN_S = 8.0
TOKEN = "a secret of the agent's environment"


def outcomes(folder: Path) -> dict[str, dict[str, object]]:
    """Run every attempt unconfined, in a process of its own; returns outcome and who was killed, by name."""
    environment = {**os.environ, "EDIF_PLANTED": TOKEN}
    command = [sys.executable, "-m", "tests.attack.victim", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=_ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return found


_ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Leave the machine, then try everything; the first process of the new pid namespace does the work."""
    folder, user, group = Path(sys.argv[1]), os.getuid(), os.getgid()
    if _libc.unshare(_OTHERS | (0 if user == 0 else _NEWUSER)) != 0:
        raise SystemExit(f"no namespaces: {os.strerror(ctypes.get_errno())}")
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    _libc.mount(b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    _libc.mount(b"proc", b"/proc", b"proc", 0, None)
    _loopback()
    world = World(folder)
    print(json.dumps({attempt.name: world.suffer(attempt) for attempt in EVERY if not attempt.harmless}), flush=True)


def _loopback() -> None:
    with socket.socket() as probe:
        fcntl.ioctl(probe, 0x8914, struct.pack("16sh", b"lo", 1 | 64).ljust(40, b"\0"))  # SIOCSIFFLAGS: up, running


class World:
    """What the attempts are after: sleepers for host and agent, files, listeners."""

    def __init__(self, folder: Path) -> None:
        self.state, self.scratch, self.other = folder / "victim-state", folder / "scratch", folder / "other"
        for path in (self.state, self.scratch, self.other):
            path.mkdir()
        self.secret, self.target = self.state / "planted", self.scratch / "target"
        self.secret.write_text("secret")
        (self.state / "key.pem").write_text("key")
        (self.other / "weights").write_text("weights")
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(folder / "unix"))
        self.unix.listen(16)
        self.folder = folder
        self.sleepers: dict[str, int] = {}

    def suffer(self, attempt: Attempt) -> dict[str, object]:
        """Try one attempt; then everything that it left is ended."""
        self.target.unlink(missing_ok=True)
        self.target.write_text("target")
        with contextlib.suppress(OSError):
            os.truncate(self.target, 4096)
        for name in ("HOST", "AGENT"):
            self.sleepers[name] = _sleeper()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            self._attack(attempt, writer)
        os.close(writer)
        outcome = _heard(reader, pid)
        killed = [attempt.kills] if attempt.kills and _has_died(self.sleepers[attempt.kills]) else []
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        for place in ("/tmp", "/dev/shm"):
            Path(place, f"edif-escape-{self.tcp.getsockname()[1]}").unlink(missing_ok=True)
        for entry in self.scratch.iterdir():
            entry.rmdir() if entry.is_dir() else entry.unlink()
        return {"outcome": outcome, "killed": killed}

    def _attack(self, attempt: Attempt, writer: int) -> None:
        status = 0
        try:
            _libc.unshare(0x20000)  # what it mounts goes with it
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
            names = self._names()
            self.tcp.close()
            self.unix.close()
            kept = socket.socketpair()  # stands for the runner's own socket
            left_open = os.open(self.secret, os.O_RDONLY)
            scope: dict[str, object] = {}
            exec(source((attempt,), names), scope)
            outcome: dict[str, str] = scope["outcome"]  # type: ignore[assignment]
            os.write(writer, outcome[attempt.name].encode())
            del kept, left_open
        except BaseException as error:
            os.write(writer, f"broke: {error!r}".encode())
            status = 1
        finally:
            os._exit(status)

    def _names(self) -> dict[str, object]:
        return {
            **self.sleepers,
            "SECRET": str(self.secret),
            "KEY": str(self.state / "key.pem"),
            "STATE": str(self.state),
            "OTHER": str(self.other),
            "TARGET": str(self.target),
            "SCRATCH": str(self.scratch),
            "PORT": self.tcp.getsockname()[1],
            "UNIX": str(self.folder / "unix"),
            "TOKEN": TOKEN[::-1],
        }


def _sleeper() -> int:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        while True:
            time.sleep(100)
    while os.getsid(pid) != pid:  # it has a group of its own from here on
        time.sleep(0.0005)
    return pid


def _heard(reader: int, pid: int) -> str:
    """Return what the attacker said: nothing and a program's exit status when it became another program."""
    end, said = time.monotonic() + _WITHIN_S, b""
    while time.monotonic() < end:
        ready, _, _ = select.select([reader], [], [], 0.5)
        if ready:
            said = os.read(reader, 4096)
            break
    os.close(reader)
    if said:
        return said.decode()
    if not ready:
        return "wrong attempt: it took too long"
    status = os.waitstatus_to_exitcode(
        os.waitpid(pid, 0)[1]
    )  # it has become another program: its end of the pipe closed
    return "escaped" if status in (0, 77) else f"wrong attempt: it ended with {status}"


def _has_died(pid: int) -> bool:
    end = time.monotonic() + 2
    while time.monotonic() < end:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return True
        except ChildProcessError:
            return True
        time.sleep(0.001)
    return False


if __name__ == "__main__":
    main()
