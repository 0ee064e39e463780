"""Which sandbox profile holds on this machine, found by trying: a process really confined tries what it must not do.

Anything that gets through, a crash, or silence means that the profile does not hold. `choose` then takes the strongest
that holds, never one below the least that the site accepts; when there is none, the site runs nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

from edif_mesh.config import SiteConfig
from edif_mesh.domain.site import SandboxProfile
from edif_mesh.errors import SandboxError
from site_agent.runner.confine import demand_kernel, interpreter_folders
from site_agent.runner.probes import LAYERS, NAMESPACES, Bait
from site_agent.runner.process import clean_environment, host_command, host_folders

Runtime = tuple[str | tuple[str, ...], ...]
_PROBES = "site_agent.runner.probes"
_PATIENCE_S = 30.0
_MAX_MESSAGE_BYTES = 64 << 10
_SEARCH = 4
"""CAP_DAC_READ_SEARCH as a bit: the one capability that a runner may keep."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a site's runners get, and what each profile that was tried lacks (empty: it holds)."""

    profile: SandboxProfile | None
    findings: dict[SandboxProfile, str]
    least: SandboxProfile = SandboxProfile.BASE

    def verdict(self) -> str:
        """Return what follows, without the reasons."""
        if self.profile is not None:
            return f"Runners are confined by the profile {self.profile}, which passed its self-test."
        return f"No sandbox profile of at least {self.least} passed its self-test, so this site runs nothing."

    def sentence(self) -> str:
        """Return the outcome for log and advert, with what each profile lacks."""
        reasons = [f"{profile}: {problem}" for profile, problem in self.findings.items() if problem]
        return " ".join([self.verdict(), *reasons])


def choose(config: SiteConfig, *, try_all: bool = False) -> Choice:
    """Try the profiles that `config` allows, the strongest first, up to the first that holds (or, for a report, all).

    Takes about a second; starts processes of its own and waits for them.
    """
    least = SandboxProfile(config.least_sandbox)
    wanted = [profile for profile in reversed(SandboxProfile) if config.sandbox in ("auto", profile)]
    findings: dict[SandboxProfile, str] = {}
    chosen: SandboxProfile | None = None
    for profile in reversed(SandboxProfile) if try_all else wanted:
        allowed = profile in wanted and profile.holds(least)
        if (allowed and chosen is None) or try_all:
            findings[profile] = try_profile(profile, config.sandbox_command)
            if allowed and chosen is None and not findings[profile]:
                chosen = profile
    if not findings:
        findings = dict.fromkeys(wanted, f"below least_sandbox = {least}, so it was not tried.")
    return Choice(chosen, findings, least)


def try_profile(
    profile: SandboxProfile, runtime: Runtime = (), *, probes: str = _PROBES, patience_s: float = _PATIENCE_S
) -> str:
    """Return why `profile` does not hold on this machine, in one sentence; "" when it holds.

    `probes` is the module that is started as a host would be.
    """
    if profile is SandboxProfile.STRICT and not runtime:
        return "no sandbox_command is configured, which would name the runtime around model hosts."
    try:
        demand_kernel()
        with _laid_out() as bait, _started(profile, runtime, probes) as (control, started):
            control.settimeout(patience_s)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                control.sendall(json.dumps(asdict(bait)).encode())
            return _judge(profile, control, started)
    except TimeoutError:
        return f"its self-test did not end within {patience_s:.0f} s."
    except (SandboxError, OSError) as error:
        return str(error)


def deviation(pid: int, profile: SandboxProfile) -> str:
    """Return what process `pid` lacks of `profile` by the kernel's own word, in one sentence; "" when nothing is amiss."""
    try:
        with open(f"/proc/{pid}/status") as file:
            status = {name: value.split() for name, _, value in (line.partition(":") for line in file)}
        # An ordinary user cannot empty the bounding set, and without new privileges nothing can be gained from it.
        bounding = ("CapBnd",) if os.geteuid() == 0 else ()
        capabilities = max(int(status[name][0], 16) & ~_SEARCH for name in ("CapPrm", "CapEff", "CapAmb", *bounding))
        if status["NoNewPrivs"] != ["1"] or status["Seccomp"] != ["2"]:
            return "the runner may still make any system call."
        if capabilities:
            return "the runner has kept capabilities."
        if profile is not SandboxProfile.BASE and len(status["NSpid"]) <= len(_own_pids()):
            return "the runner is in the agent's own pid namespace."
        if profile is SandboxProfile.NAMESPACED and os.geteuid() == 0 and "0" in status["Uid"]:
            return "the runner is root."
    except (OSError, KeyError, ValueError, IndexError) as error:
        return f"the kernel does not say how process {pid} is confined ({error!r})."
    return ""


def _own_pids() -> list[str]:
    with open("/proc/self/status") as file:
        return next(line.split()[1:] for line in file if line.startswith("NSpid:"))


# ------------------------------------------------------------------------------------------------------------ inside


@contextlib.contextmanager
def _laid_out() -> Iterator[Bait]:
    """Lay out what a runner must not reach: a file, a folder, a port and a socket of the agent."""
    name = f"edif-self-test-{secrets.token_hex(8)}"
    with (
        tempfile.TemporaryDirectory(prefix="edif-self-test-") as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as abstract,
    ):
        abstract.bind(f"\0{name}")
        abstract.listen()
        canary = os.path.join(folder, "canary")
        with open(canary, "w") as file:
            file.write(name)
        yield Bait(canary, folder, server.getsockname()[1], name, os.getpid())


@contextlib.contextmanager
def _started(profile: SandboxProfile, runtime: Runtime, probes: str) -> Iterator[tuple[socket.socket, _Started]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    around = runtime if profile is SandboxProfile.STRICT else ()
    command = host_command(probes, (str(theirs.fileno()), profile), around, host_folders(interpreter_folders()))
    with ours, theirs, tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words,
            env=clean_environment(),
            start_new_session=True,
        )
        try:
            theirs.close()
            yield ours, _Started(process, words)
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True, slots=True)
class _Started:
    """The probes' process, and what it writes when nobody listens to its socket."""

    process: subprocess.Popen[bytes]
    words: IO[bytes]

    def last_words(self) -> str:
        """It is gone without an end: return what it, or the runtime around it, wrote."""
        try:
            code: int | str = self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            code = "none yet"
        self.words.seek(0)
        last = (self.words.read().decode(errors="replace").strip().splitlines() or ["without a word"])[-1][:300]
        return f"its self-test ended early: {last} (exit {code})."


def _judge(profile: SandboxProfile, control: socket.socket, started: _Started) -> str:
    """Follow what the probes say to its end; the first fault is the answer."""
    layers, namespaces = list(LAYERS[profile]), False
    pidfd = -1
    try:
        while True:
            message, descriptors = _receive(control)
            if descriptors:
                pidfd = _replace(pidfd, descriptors[0])
            if message is None:
                return started.last_words()
            if "error" in message:
                return str(message["error"])
            if "namespaces" in message:
                namespaces = True
                if shared := _shared(profile, message["namespaces"]):
                    return f"the {', '.join(shared)} namespaces are still the agent's own."
            elif "layer" in message:
                if message["through"]:
                    return f"a confined process could {'; '.join(message['through'])}."
                if not layers or message["layer"] != layers.pop(0) or message["tried"] < 5:
                    return "its self-test did not try what it should."
                if message["layer"] == "sealed" and (problem := _look_and_end(pidfd, profile)):
                    return problem
            elif "end" in message:
                return "" if namespaces and not layers else "its self-test has left a part out."
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _receive(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    try:
        data, descriptors, _, _ = socket.recv_fds(control, _MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None, []
    return (json.loads(data) if data else None), list(descriptors)


def _replace(old: int, new: int) -> int:
    if old >= 0:
        os.close(old)
    return new


def _shared(profile: SandboxProfile, theirs: dict[str, str]) -> list[str]:
    """Return the namespaces that should not be the agent's and are; root's hosts stay in its user namespace, runners do not."""
    if profile is SandboxProfile.BASE:
        return []
    return [
        name
        for name in NAMESPACES
        if theirs.get(name) == os.readlink(f"/proc/self/ns/{name}") and (name != "user" or os.geteuid() != 0)
    ]


def _look_and_end(pidfd: int, profile: SandboxProfile) -> str:
    """Look at the confined process from outside, and kill it as a supervisor would."""
    pid = pid_of(pidfd)
    if problem := deviation(pid, profile):
        return problem
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return ""


def pid_of(pidfd: int) -> int:
    """Return the process id of a pidfd as this process counts; raises SandboxError when it cannot be seen from here."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        pid = next((int(line.split()[1]) for line in file if line.startswith("Pid:")), -1)
    if pid <= 0:
        raise SandboxError("a process of the sandbox cannot be seen from the agent, so it could not be watched.")
    return pid
