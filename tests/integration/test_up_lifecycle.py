"""`edif up` and `edif down` as their users type them: start, stop, start again, and everything that can be in the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from threading import Thread

import psutil
import pytest

from edif_mesh.client.mesh import Mesh
from edif_mesh.config import ClientConfig, load_config
from edif_mesh.domain.ids import SiteId
from edif_mesh.domain.job import JobStatus
from edif_mesh.transport.embedded import free_port
from tests.mesh import RunningMesh, environment, running_mesh, until
from tests.models import tiny_gpt2
from tests.submitting import payload_of_noise, payload_that_beats

PATIENCE_S = 60.0


class Up:
    """`edif up` in the foreground, and what it has said so far."""

    def __init__(self, home: Path, *options: str, sites: int = 1, gateway: int = 0, monitor: int = 0) -> None:
        self.home = home
        self.ports = gateway or free_port(), monitor or free_port()
        ports = ["--port", str(self.ports[0]), "--monitor-port", str(self.ports[1])]
        command = [*EDIF, "up", "--state", str(home), "--sites", str(sites), "--model", tiny_gpt2(), *ports, *options]
        self.process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._arriving: Queue[str] = Queue()
        Thread(target=self._read, daemon=True).start()

    def until_it_says(self, text: str) -> str:
        """Return everything said up to the line that contains `text`."""
        while not any(text in line for line in self.lines):
            line = self._arriving.get(timeout=PATIENCE_S)
            assert line, f"it ended without saying {text!r}: {''.join(self.lines)}"
            self.lines.append(line)
        return "".join(self.lines)

    def ends(self) -> tuple[int, str]:
        """Return its exit code and everything it said."""
        code = self.process.wait(PATIENCE_S)
        while line := self._arriving.get(timeout=PATIENCE_S):
            self.lines.append(line)
        return code, "".join(self.lines)

    def family(self) -> list[psutil.Process]:
        """Every process below it, and itself."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._arriving.put(line)
        self._arriving.put("")


EDIF = (sys.executable, "-m", "edif_mesh.cli")


@contextlib.contextmanager
def up(home: Path, *options: str, sites: int = 1, gateway: int = 0, monitor: int = 0) -> Iterator[Up]:
    """Run it, and end it whatever the test did."""
    running = Up(home, *options, sites=sites, gateway=gateway, monitor=monitor)
    try:
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        try:
            running.process.wait(PATIENCE_S)
        finally:
            running.process.kill()


def edif(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*EDIF, *arguments], env=environment(**more), capture_output=True, text=True, timeout=120)


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=15)[1]


def test_ctrl_c_ends_everything_it_started(tmp_path: Path) -> None:
    with up(tmp_path) as mesh:
        said = mesh.until_it_says("Ready")
        assert f"NDIF_HOST=http://127.0.0.1:{mesh.ports[0]}" in said
        family = mesh.family()
        names = " ".join(" ".join(process.cmdline()) for process in family)
        for part in ("nats-server", "coordinator run", "site_agent run", "edif_mesh.gateway", "hosting.launch"):
            assert part in names
        os.kill(mesh.process.pid, signal.SIGINT)
        code, said = mesh.ends()
        assert code == 0, said
        assert "Traceback" not in said
        assert gone(family)
    assert edif("down", "--state", str(tmp_path)).returncode == 4


def test_a_mesh_that_is_still_starting_can_be_stopped(tmp_path: Path) -> None:
    with up(tmp_path) as mesh:
        assert until(lambda: (tmp_path / "mesh.json").exists())
        family = mesh.family()
        stopped = edif("down", "--state", str(tmp_path), "--json")
        assert stopped.returncode == 0, stopped.stderr
        assert json.loads(stopped.stdout) == {"stopped": True}
        assert mesh.ends()[0] == 0
        assert gone(family)


def test_a_second_start_goes_on_where_the_first_one_stopped_with_fewer_sites_too(tmp_path: Path) -> None:
    payload, spec = payload_that_beats(tiny_gpt2(), beats=30)
    with running_mesh(tmp_path, tiny_gpt2(), sites=2, slots=1) as mesh, mesh.client() as client:
        names = [client.submit(payload, spec).id for _ in range(3)]
        assert until(lambda: client.job(names[0]).logs()), client.job(names[0]).status().text
        keys = {file: file.read_bytes() for file in tmp_path.rglob("*.pem")}
    with running_mesh(tmp_path, tiny_gpt2(), sites=1, slots=1) as mesh, mesh.client() as client:
        here = next(site for site in client.view().sites if site.site == "ansbach")
        assert [model.state for model in here.models] == ["LOADED"], "ready was said too early"
        assert {file: file.read_bytes() for file in tmp_path.rglob("*.pem")} == keys
        assert {found.job for found in client.jobs(5)} == set(names)
        for name in names:
            assert client.job(name).wait().status is JobStatus.SUCCEEDED
            assert client.job(name).result()["logits"].shape[-1] == 512


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    with running_mesh(tmp_path_factory.mktemp("mesh"), tiny_gpt2(), sites=1) as mesh:
        yield mesh


def everything_under(home: Path) -> dict[Path, bytes]:
    return {
        f: f.read_bytes()
        for f in home.rglob("*")
        if f.suffix in (".toml", ".json", ".pem") or f.name in ("nats-port", "direct-port")
    }


def endpoint_of(mesh: RunningMesh) -> psutil.Process | None:
    """The endpoint's process, when it runs."""
    agent = psutil.Process(mesh.processes()["site-ansbach"])
    return next((p for p in agent.children() if "site_agent.direct.endpoint" in p.cmdline()), None)


def check(mesh: RunningMesh) -> str:
    """What `edif-site check` says of the site."""
    command = [sys.executable, "-m", "site_agent", "check", "--config", str(mesh.home / "sites/ansbach/site.toml")]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60).stdout


async def test_a_large_result_comes_straight_from_the_site_and_from_the_broker_when_that_is_gone(
    mesh: RunningMesh,
) -> None:
    assert "answers with this certificate" in check(mesh)
    payload, spec = payload_of_noise(tiny_gpt2(), 24)
    async with await Mesh.connect(mesh.home / "client.toml") as client:
        job = await client.submit(payload, spec, follow=False)
        straight = (await job.result())["noise"]
        assert straight.numel() == 24 << 20
        assert client.paths.known(SiteId("ansbach")).direct is not None
        first = endpoint_of(mesh)
        assert first is not None
        first.kill()
        by_the_broker = (await client.job(job.id).result())["noise"]
        assert (by_the_broker == straight).all()
    assert until(lambda: (new := endpoint_of(mesh)) is not None and new.pid != first.pid), "it was not started again"
    kept = list((mesh.home / "sites/ansbach/direct/results").iterdir())
    assert {file.suffix for file in kept} == {".data", ".index"}


async def test_a_researcher_may_want_nothing_straight_from_a_site(mesh: RunningMesh) -> None:
    file = mesh.home / "indirect.toml"
    file.write_text((mesh.home / "client.toml").read_text() + "\n[results]\ndirect = false\n")
    assert not load_config(ClientConfig, file).results.direct
    payload, spec = payload_of_noise(tiny_gpt2(), 24)
    async with await Mesh.connect(file) as client:
        job = await client.submit(payload, spec, follow=False)
        assert (await job.result())["noise"].numel() == 24 << 20
        assert client.paths.known(SiteId("ansbach")).direct is None


@pytest.mark.parametrize("options", [(), ("--detach",)])
def test_a_second_mesh_on_the_same_state_is_refused_and_disturbs_nothing(
    mesh: RunningMesh, options: tuple[str, ...]
) -> None:
    before = everything_under(mesh.home)
    with up(mesh.home, *options) as second:
        code, said = second.ends()
    assert code == 2
    assert said.strip() == (
        f"A mesh runs on {mesh.home} already. Use it, stop it with `edif down`, or choose another folder with --state."
    )
    assert everything_under(mesh.home) == before
    assert mesh.edif("status").returncode == 0


@pytest.mark.parametrize("options", [(), ("--detach",), ("--detach", "--json")])
@pytest.mark.parametrize("taken", ["gateway", "monitor"])
def test_a_port_in_use_is_a_sentence(tmp_path: Path, options: tuple[str, ...], taken: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with up(tmp_path, *options, **{taken: port}) as mesh:
            code, said = mesh.ends()
    assert code == 2
    text = f"Port {port} on 127.0.0.1 is in use by another program. Stop that one, or choose another port."
    assert (json.loads(said)["error"]["text"] if "--json" in options else said.strip()) == text


def test_a_missing_model_says_what_to_type(tmp_path: Path) -> None:
    for name, hint in (("nobody/nothing", "Type: hf download nobody/nothing"), ("./nowhere", "There is no folder")):
        done = edif("up", "--state", str(tmp_path), "--model", name)
        assert done.returncode == 4, done.stderr
        assert hint in done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    done = edif("up", "--state", str(tmp_path), "--model", str(empty))
    assert done.returncode == 4
    assert "no config.json" in done.stderr
    assert not (tmp_path / "mesh.json").exists()


def test_a_state_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    for options in ((), ("--detach",)):
        done = edif("up", "--state", str(file), "--model", tiny_gpt2(), *options)
        assert done.returncode == 2
        assert done.stderr.startswith(f"The state folder {file} cannot be written")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine mounts nothing")
    try:
        for options in ((), ("--detach",)):
            done = edif("up", "--state", str(small / "state"), "--model", tiny_gpt2(), *options)
            assert done.returncode == 1, done.stdout + done.stderr
            assert "less than 64 MiB free" in done.stderr
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_damaged_database_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "coordinator").mkdir()
    (tmp_path / "coordinator" / "coordinator.db").write_bytes(b"this is no database" * 1000)
    with up(tmp_path) as mesh:
        code, said = mesh.ends()
        assert code == 2
        assert "coordinator cannot be started" in said
        assert "Traceback" not in said
        assert not (tmp_path / "mesh.json").exists()


def test_a_damaged_trust_store_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "trust.json").write_text("{")
    with up(tmp_path) as mesh:
        code, said = mesh.ends()
    assert code == 2
    assert str(tmp_path / "trust.json") in said
    assert "Traceback" not in said


def test_a_child_that_dies_is_started_again_and_it_is_said(tmp_path: Path) -> None:
    with up(tmp_path) as mesh:
        mesh.until_it_says("Ready")
        for name in ("gateway", "coordinator", "site-ansbach"):
            os.kill(RunningMesh(tmp_path, "", "", ()).processes()[name], signal.SIGKILL)
            mesh.until_it_says(f"{name} ended (killed by SIGKILL); starting it again in 0.5 s")
            mesh.until_it_says(f"{name} is back")
        os.kill(RunningMesh(tmp_path, "", "", ()).processes()["nats"], signal.SIGKILL)
        mesh.until_it_says("nats-server ended (killed by SIGKILL); starting it again")
        mesh.until_it_says("nats-server is back")
        assert until(lambda: edif("status", EDIF_HOME=str(tmp_path)).returncode == 0)


def test_nothing_outlives_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    with up(tmp_path) as mesh:
        mesh.until_it_says("Ready")
        family = mesh.family()
        mesh.process.kill()
        assert gone(family)
    assert edif("down", "--state", str(tmp_path)).returncode == 4
    with up(tmp_path) as mesh:
        mesh.until_it_says("Ready")


def test_down_ends_no_stranger_that_has_the_supervisor_s_process_id(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        said = {"supervisor": stranger.pid, "supervisor_birth": "1", "ready": True, "processes": {}}
        (tmp_path / "mesh.json").write_text(json.dumps(said))
        done = edif("down", "--state", str(tmp_path))
        assert done.returncode == 4
        assert done.stderr.strip() == f"No local mesh runs on {tmp_path}. Type: edif up"
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
