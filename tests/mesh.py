"""A real mesh for tests: `edif up` in a folder of its own, as its users start it, with ways to kill parts of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from edif_mesh.client import BlockingMesh
from edif_mesh.transport.embedded import free_port
from tests.models import cache

ROOT = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """The environment of every process that a test starts: offline, the test models, this checkout."""
    return {
        **os.environ,
        "HF_HUB_CACHE": str(cache()),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def hosts_of(agent: int) -> list[psutil.Process]:
    """The model hosts of an agent: its children, or theirs where a process of each stays outside its namespaces and waits."""
    started = psutil.Process(agent).children()
    return [host for p in started for host in (p.children() if p.cmdline()[-1] == "namespaced" else [p])]


@dataclass
class RunningMesh:
    """One running mesh."""

    home: Path
    gateway_url: str
    monitor_url: str
    models: tuple[str, ...]
    families: set[int] = field(default_factory=set)

    def client(self) -> BlockingMesh:
        """A connected client with the researcher's key."""
        return BlockingMesh(self.home / "client.toml")

    def edif(self, *arguments: str, timeout_s: float = 60, **more: str) -> subprocess.CompletedProcess[str]:
        """Run the `edif` command against this mesh, with `more` in its environment."""
        command = [sys.executable, "-m", "edif_mesh.cli", *arguments]
        settings = environment(EDIF_HOME=str(self.home), COLUMNS="200", **more)
        return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=timeout_s)

    def audited(self, job: str) -> list[str]:
        """What the coordinator's audit says of a job, in order."""
        with sqlite3.connect(f"file:{self.home / 'coordinator' / 'coordinator.db'}?mode=ro", uri=True) as database:
            found = database.execute("select what from edif_audit where job = ? order by rowid", (job,))
            return [what for (what,) in found]

    def processes(self) -> dict[str, int]:
        """Process ids by name: coordinator, site-NAME, gateway, nats."""
        value: dict[str, Any] = json.loads((self.home / "mesh.json").read_text())
        return {str(name): int(pid) for name, pid in value["processes"].items()}

    def family(self, name: str) -> list[psutil.Process]:
        """A process and everything below it, the process first."""
        process = psutil.Process(self.processes()[name])
        return [process, *process.children(recursive=True)]

    def hosts(self, site: str) -> list[psutil.Process]:
        """The model hosts of a site."""
        return hosts_of(self.processes()[f"site-{site}"])

    def kill(self, name: str) -> None:
        """`kill -9` of one process."""
        os.kill(self.processes()[name], signal.SIGKILL)

    def kill_family(self, name: str) -> None:
        """`kill -9` of a process and everything below it."""
        for process in self.family(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def remember_processes(self) -> None:
        """Note every process of the mesh, to see later that none is left."""
        supervisor = psutil.Process(int(json.loads((self.home / "mesh.json").read_text())["supervisor"]))
        self.families |= {p.pid for p in [supervisor, *supervisor.children(recursive=True)]}

    def left_over(self) -> list[str]:
        """The command lines of processes that were noted and live still."""
        found = []
        for pid in self.families:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline())[:120])
        return found


@contextlib.contextmanager
def running_mesh(
    home: Path,
    *models: str,
    sites: int = 2,
    slots: int = 2,
    lease_ms: int = 30_000,
    sandbox: str = "auto",
    through: tuple[str, ...] = (),
    settings: dict[str, str] | None = None,
) -> Iterator[RunningMesh]:
    """Start a mesh with `models`, and stop it; nothing of it is left behind.

    `through` is a command that starts the rest of its line (as another user); `settings` go into its environment.
    """
    gateway, monitor = free_port(), free_port()
    options = ["--sites", str(sites), "--port", str(gateway), "--monitor-port", str(monitor), "--slots", str(slots)]
    options += [part for model in models for part in ("--model", model)]
    options += ["--sandbox", sandbox]
    command = [*through, sys.executable, "-m", "edif_mesh.cli", "up", "--detach", "--state", str(home), *options]
    done = subprocess.run(command, env=environment(**settings or {}), capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    mesh = RunningMesh(home, f"http://127.0.0.1:{gateway}", f"http://127.0.0.1:{monitor}", models)
    mesh.remember_processes()
    try:
        yield mesh
        mesh.remember_processes()
    finally:
        command = [sys.executable, "-m", "edif_mesh.cli", "down", "--state", str(home)]
        subprocess.run(command, env=environment(), capture_output=True, timeout=60)
    assert until(lambda: not mesh.left_over(), 10), mesh.left_over()


def until(condition: Callable[[], Any], within_s: float = 60) -> Any:
    """Return the condition's first true value, or what it said last when the time is up."""
    end = time.monotonic() + within_s
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return value
