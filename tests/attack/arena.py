"""A real mesh that is attacked: `edif up` under one profile and one user, a planted world around it, and what must stay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from edif_mesh.client import BlockingMesh
from edif_mesh.client.mesh import JobSpec
from edif_mesh.domain.job import JobStatus, Limits
from edif_mesh.domain.site import ModelRef, ModelState, SandboxProfile, Versions
from edif_mesh.errors import EdifError
from edif_mesh.wire.messages import JobSnapshot
from tests import ordinary_user
from tests.attack.corpus.bombs import LOG_BYTES, MEMORY_BYTES, RESULT_BYTES
from tests.attack.corpus.state import REFERENCE
from tests.hosted import code
from tests.mesh import RunningMesh, environment, running_mesh, until
from tests.models import TINY, cache, tiny_gpt2
from tests.raw_client import RawClient
from tests.runtimes import BUBBLEWRAP

LIMITS: dict[str, int] = {
    "wall_ms": 20_000,
    "memory_bytes": MEMORY_BYTES,
    "result_bytes": RESULT_BYTES,
    "log_bytes": LOG_BYTES,
}
_MODEL = f"models--{TINY.replace('/', '--')}"
TOKEN = "a secret of the agent's environment"


@dataclass
class Ended:
    """How one job ended: its last snapshot, its values or the error that the client gave instead, what it printed."""

    last: JobSnapshot
    values: dict[str, Any] = field(default_factory=dict)
    error: EdifError | None = None
    printed: list[str] = field(default_factory=list)

    @property
    def code(self) -> str:
        """The failure's code, "" for a job that succeeded."""
        return self.last.failure.code if self.last.failure is not None else ""


class Arena:
    """One mesh under attack."""

    def __init__(self, mesh: RunningMesh, client: BlockingMesh, world: Path, profile: str, unix: Path) -> None:
        self.mesh, self.client, self.profile = mesh, client, profile
        self._scratch = world / "scratch"
        site = mesh.home / "sites" / "ansbach"
        self.names: dict[str, object] = {
            "HOST": self._host(),
            "AGENT": mesh.processes()["site-ansbach"],
            "SECRET": str(world / "planted"),
            "KEY": str(site / "key.pem"),
            "STATE": str(site),
            "OTHER": str(world / "other"),
            "TARGET": str(self._scratch / "target"),
            "SCRATCH": str(self._scratch),
            "PORT": int((mesh.home / "nats-port").read_text()),
            "UNIX": str(unix),
            "TOKEN": TOKEN[::-1],
        }
        self.reference = self.run(REFERENCE).values["outcome"]
        self._processes = self._settled()

    def run(self, source: str, **limits: int) -> Ended:
        """Run `source` as the block of a job; returns how it ended."""
        return self.client.run(self._play(code(source), {**LIMITS, **limits}))

    def run_all(self, sources: list[tuple[str, dict[str, Any]]]) -> list[Ended]:
        """Run many, as many at a time as the site has slots."""

        async def all_of_them() -> list[Ended]:
            two = asyncio.Semaphore(2)

            async def one(source: str, limits: dict[str, Any]) -> Ended:
                async with two:
                    return await self._play(code(source), {**LIMITS, **limits})

            return await asyncio.gather(*(one(*job) for job in sources))

        return self.client.run(all_of_them())

    def through_the_gateway(self, source: str) -> list[dict[str, Any]]:
        """Run `source` as a job of the unmodified client's protocol; returns all frames that the gateway answered."""
        raw = RawClient(self.mesh.gateway_url)
        session = raw.subscribe()
        try:
            return session.run(code(source))
        finally:
            session.close()
            raw.http.close()

    def is_unharmed(self) -> None:
        """The next job says to the bit what the first said; no process and no file is left; host and agent live on."""
        ended = self.run(REFERENCE)
        assert ended.values.get("outcome") == self.reference, ended.last
        assert sorted(path.name for path in self._scratch.iterdir()) == ["target"]
        assert (self._scratch / "target").read_text() == "target"
        assert not [
            place for place in ("/tmp", "/dev/shm") if Path(place, f"edif-escape-{self.names['PORT']}").exists()
        ]
        assert until(lambda: self._host() == self.names["HOST"], 20), (
            "the host is another"
        )  # while it forks, it has no child
        assert self.mesh.processes()["site-ansbach"] == self.names["AGENT"]
        assert until(lambda: self._alive() == self._processes, 20), (self._alive(), self._processes)

    async def _play(self, payload: bytes, limits: dict[str, int]) -> Ended:
        spec = JobSpec(
            model=ModelRef(TINY),
            uncompressed_bytes=len(payload),
            client=Versions(nnsight=version("nnsight")),
            limits=Limits(**limits),
            max_attempts=1,
        )
        job = await self.client.mesh.submit(payload, spec)
        try:
            ended = Ended(await job.wait())
            if ended.last.status is JobStatus.SUCCEEDED:
                try:
                    ended.values = await job.result()
                except EdifError as error:
                    ended.error = error
            ended.printed = [line async for line in job.logs()]
            return ended
        finally:
            await job.close()

    def _host(self) -> int:
        """The model host: whoever has forked the runners, which have no children; waiters and runtimes stand above it."""
        agent = psutil.Process(self.mesh.processes()["site-ansbach"])

        def parents_of_leaves() -> list[int]:
            with contextlib.suppress(psutil.NoSuchProcess):  # a runner may end while we look
                return [p.ppid() for p in agent.children(recursive=True) if not p.children()]
            return []

        return int(until(parents_of_leaves)[0])

    def _settled(self) -> int:
        """How many processes there are once the next runners wait: no more come and none go."""
        counts = [0]
        until(lambda: counts.append(self._alive()) or (len(counts) > 8 and len(set(counts[-8:])) == 1), 20)
        return counts[-1]

    def _alive(self) -> int:
        """How many processes have the mark of this mesh in the environment that they began with, wherever they hang."""
        count = 0
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TMPDIR") == self._mark:
                    count += 1
        return count

    @property
    def _mark(self) -> str:
        return str(self.mesh.home.parent / "tmp")


@contextlib.contextmanager
def arena(profile: SandboxProfile, user: int) -> Iterator[Arena]:
    """Start a mesh under `profile` as `user`, attack-ready, and end it; everything lies in one folder, removed after."""
    tiny_gpt2()
    folder = Path(tempfile.mkdtemp(prefix="edif-attack-"))
    try:
        home, world = folder / "mesh", folder / "world"
        for path in (home, folder / "tmp", world, world / "scratch", world / "other", folder / "outbox"):
            path.mkdir()
        (world / "planted").write_text("secret")
        (world / "scratch" / "target").write_text("target")
        (world / "other" / "weights").write_text("weights")
        shutil.copytree(cache() / _MODEL, folder / "hub" / _MODEL, symlinks=True)
        if user != os.getuid():
            for path in (folder, home, folder / "tmp", *(folder / "hub").rglob("*")):
                os.chown(path, user, user)
        for path in (folder, world, world / "other", folder / "hub"):
            path.chmod(0o755)
        for path in (world / "planted", world / "scratch" / "target", world / "scratch"):
            path.chmod(0o777)
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(world / "unix"))
            unix.listen(8)
            (world / "unix").chmod(0o777)
            settings = {"EDIF_PLANTED": TOKEN, "HOME": str(home), "USER": "attacked"}
            start = SandboxProfile.BASE if profile is SandboxProfile.STRICT else profile
            settings |= {"TMPDIR": str(folder / "tmp"), "HF_HUB_CACHE": str(folder / "hub")}
            with (
                running_mesh(home, TINY, sites=1, sandbox=start, through=_as_user(user), settings=settings) as mesh,
                _client(mesh, folder) as client,
            ):
                if profile is SandboxProfile.STRICT:
                    _confine_more(mesh, client)
                assert [site.sandbox.partition(":")[0] for site in client.view().sites] == [profile]
                loaded = [model for site in client.view().sites for model in site.models]
                assert [model.state for model in loaded] == [ModelState.LOADED], loaded
                yield Arena(mesh, client, world, profile, world / "unix")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _client(mesh: RunningMesh, folder: Path) -> Iterator[BlockingMesh]:
    """The researcher, with an outbox of its own: this process may be another user than the mesh."""
    own = mesh.home / "attacker.toml"
    own.write_text((mesh.home / "client.toml").read_text().replace("'outbox'", f"'{folder / 'outbox'}'"))
    with BlockingMesh(own) as client:
        yield client


def what_is_lacking(profile: SandboxProfile, user: int) -> str:
    """What the site's own self-test says against `profile` as `user`; "" when it holds."""
    runtime = BUBBLEWRAP if profile is SandboxProfile.STRICT else ()
    script = f"from site_agent.runner.selftest import try_profile as t; print(t({str(profile)!r}, {runtime!r}))"
    script = script.replace("t('", "t(P('", 1).replace("',", "'),", 1)
    script = f"from edif_mesh.domain.site import SandboxProfile as P; {script}"
    command = [*_as_user(user), sys.executable, "-c", script]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).strip()


def _as_user(user: int) -> tuple[str, ...]:
    if user == os.getuid():
        return ()
    return (sys.executable, "-m", "tests.ordinary_user", str(user))


def _confine_more(mesh: RunningMesh, client: BlockingMesh) -> None:
    """Put the site's own runtime around its hosts: settings that `edif up` leaves to a site, read at the agent's start."""
    settings = mesh.home / "sites" / "ansbach" / "site.toml"
    words = json.dumps([list(part) if isinstance(part, tuple) else part for part in BUBBLEWRAP])
    text = settings.read_text().replace('sandbox = "base"', f'sandbox = "strict"\nsandbox_command = {words}')
    settings.write_text(text)
    mesh.kill("site-ansbach")

    def is_back() -> bool:
        sites = client.view().sites
        return [(site.sandbox, model.state) for site in sites for model in site.models] == [
            ("strict", ModelState.LOADED)
        ]

    assert until(is_back, 60), client.view().sites
    until(lambda: mesh.processes()["site-ansbach"] and psutil.pid_exists(mesh.processes()["site-ansbach"]))


def ordinary_users() -> tuple[int, ...]:
    """Who the mesh can run as on this machine: root and an ordinary user, or whoever runs the test."""
    return (0, ordinary_user.UID) if os.getuid() == 0 else (os.getuid(),)
