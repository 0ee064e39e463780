"""A result on its way while links, brokers and clients die: the bytes arrive once, verified, and few are sent again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.link import Link
from edif_mesh.config import ClientConfig, load_config
from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.results.transfer import ResultWriter
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import FileSink
from edif_mesh.transport.bulk import NatsBulk
from edif_mesh.transport.nats_bus import Connection
from edif_mesh.wire import subjects
from edif_mesh.wire.messages import Manifest
from site_agent.shell.bulk import Cargo
from site_agent.shell.spool import Spool
from tests.builders_transfer import a_manifest
from tests.contract.nats_starter import NatsServer, link_is
from tests.mesh import RunningMesh, environment, running_mesh, until
from tests.models import tiny_gpt2
from tests.submitting import large_job

JOB, ONE = JobId("j0000000000000000000000a"), AttemptNumber(1)
MB = 1_000_000
MAX_BYTES = {spec.name: 900 << 20 for spec in subjects.STREAMS}


async def stored(connection: Connection, data: bytes) -> Manifest:
    bulk = NatsBulk.beside(connection)
    writer = ResultWriter(bulk, JOB, ONE)
    await writer.feed(data)
    manifest = a_manifest(JOB, ONE, await writer.finish())
    await bulk.close()
    return manifest


@pytest.mark.parametrize(("megabytes", "cuts"), [(60, 4), pytest.param(300, 20, marks=pytest.mark.slow)])
async def test_a_link_that_is_cut_again_and_again_costs_under_a_twentieth(
    server: NatsServer, connection: Connection, tmp_path: Path, megabytes: int, cuts: int
) -> None:
    chance = random.Random(megabytes)
    data = b"".join(chance.randbytes(MB) for _ in range(megabytes))
    manifest = await stored(connection, data)
    points = sorted(chance.randrange(len(data)) for _ in range(cuts))
    with Link(server.url.rpartition("/")[2], mbit=400) as link:
        bulk = NatsBulk(f"nats://{link.address}", name="far reader")

        def cut_there(done: int, total: int) -> None:
            if points and done >= points[0]:
                while points and done >= points[0]:
                    points.pop(0)
                link.cut()

        stats = await ResultReader(bulk, JOB, FileSink(tmp_path / "result")).read(manifest, cut_there)
        carried = link.carried()[0]
        await bulk.close()
    assert points == []
    assert (tmp_path / "result").read_bytes() == data
    assert len(data) <= stats.fetched_bytes <= carried < 1.05 * len(data)


async def test_on_a_slow_link_what_waits_behind_other_chunks_is_not_asked_for_again(
    server: NatsServer, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edif_mesh.transport.bulk._TRY_S", 1.0)  # a chunk takes 0.5 s, the eighth comes after 4
    data = random.Random(7).randbytes(8 * MB)
    manifest = await stored(connection, data)
    with Link(server.url.rpartition("/")[2], rtt_ms=40, mbit=16) as link:
        bulk = NatsBulk(f"nats://{link.address}", name="slow reader")
        await ResultReader(bulk, JOB, FileSink(tmp_path / "result")).read(manifest)
        carried = link.carried()[0]
        await bulk.close()
    assert (tmp_path / "result").read_bytes() == data
    assert carried < 1.01 * len(data)


async def test_a_broker_killed_while_chunks_are_stored_and_read_keeps_what_it_acknowledged(
    server: NatsServer, connection: Connection, tmp_path: Path
) -> None:
    data = random.Random(5).randbytes(60 * MB)
    writing, reading = NatsBulk.beside(connection), NatsBulk.beside(connection)
    writer, reader = ResultWriter(writing, JOB, ONE), ResultReader(reading, JOB, FileSink(tmp_path / "result"))
    await reader.follow()
    for number, start in enumerate(range(0, len(data), MB)):
        await writer.feed(data[start : start + MB])
        if number in (15, 40):
            server.kill()
            server.start()
    manifest = a_manifest(JOB, ONE, await writer.finish())
    killed = False

    def kill_once(done: int, total: int) -> None:
        nonlocal killed
        if not killed and done > total // 2:
            killed = True
            server.kill()
            server.start()

    await reader.read(manifest, kill_once)
    assert (tmp_path / "result").read_bytes() == data
    await link_is(connection.bus, True)  # the bulk connections may be back before it
    held = await connection.streams.subjects(subjects.RESULTS_STREAM, subjects.result_chunks(JOB))
    assert set(held.values()) == {1}
    await writing.close()
    await reading.close()


async def test_an_accepted_result_waits_for_room_in_a_full_store(
    connection: Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {spec.name: 64 << 20 for spec in subjects.STREAMS}
    await connection.streams.ensure(subjects.STREAMS, max_bytes={**limits, subjects.RESULTS_STREAM: 4 << 20})
    data = random.Random(6).randbytes(12 * MB)
    cargo, spool = Cargo(connection.streams, NatsBulk.beside(connection)), Spool(tmp_path)
    await spool.put(data)
    spool.end()
    storing = asyncio.create_task(cargo.store((JOB, ONE), spool))
    async with asyncio.timeout(30):
        while "store is full" not in " ".join(str(getattr(record, "text", "")) for record in caplog.records):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert not storing.done()
    await connection.streams.ensure(subjects.STREAMS, max_bytes=limits)
    manifest = a_manifest(JOB, ONE, await asyncio.wait_for(storing, 30))
    bulk = NatsBulk.beside(connection)
    await ResultReader(bulk, JOB, FileSink(tmp_path / "result")).read(manifest)
    assert (tmp_path / "result").read_bytes() == data
    await bulk.close()
    await cargo.close()


# -------------------------------------------------------------------------------------------------------- a real mesh


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    with running_mesh(tmp_path_factory.mktemp("faults"), tiny_gpt2(), sites=1) as mesh:
        yield mesh


def finished(mesh: RunningMesh, mebibytes: int) -> str:
    """A job whose result of this size lies at the mesh."""
    with mesh.client() as client:
        job = client.submit(*large_job(mebibytes))
        job.wait()
        return str(job.id)


def fetching(home: Path, job: str, target: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edif_mesh.cli", "fetch", job, "-o", str(target), "--json"]
    return subprocess.Popen(command, env=environment(EDIF_HOME=str(home)), stdout=subprocess.DEVNULL)


def test_a_killed_client_goes_on_with_what_it_has_and_another_machine_begins_anew(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    import torch

    from edif_mesh.results.archive import read

    job = finished(mesh, 60)
    target, part = tmp_path / "a.edif", tmp_path / "a.edif.part"
    first = fetching(mesh.home, job, target)
    assert until(lambda: part.exists() and part.stat().st_size > 2 << 20)
    first.kill()
    first.wait()
    assert not target.exists()
    have = (tmp_path / "a.edif.part.have").read_text().count("\n")
    assert have > 1
    assert fetching(mesh.home, job, target).wait(60) == 0
    assert torch.equal(read(target)["big"], torch.ones(60 << 18))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = load_config(ClientConfig, mesh.home / "client.toml")
    broker = config.broker
    (elsewhere / "client.toml").write_text(  # the key and what it trusts, and nothing of what was fetched
        f"federation = '{config.federation}'\nkey_file = '{config.key_file}'\ntrust_file = '{config.trust_file}'\n"
        f"outbox_dir = 'outbox'\n[broker]\nurl = '{broker.url}'\nuser = '{broker.user}'\npassword_file = '{broker.password_file}'\n"
    )
    moved = fetching(elsewhere, job, tmp_path / "b.edif")
    assert moved.wait(60) == 0
    assert (tmp_path / "b.edif").read_bytes() == target.read_bytes()


@pytest.mark.slow
def test_a_larger_result_takes_no_more_memory_anywhere(mesh: RunningMesh, tmp_path: Path) -> None:
    small, large = 200, 1000  # what is under way at most, some 32 chunks, fits into the smaller one
    peaks = {size: peaks_of(mesh, finished(mesh, size), tmp_path / f"{size}.edif") for size in (small, large)}
    for name, most in peaks[large].items():
        assert most < peaks[small][name] + (64 << 20), f"{name}: {peaks[small][name]:,} and {most:,} bytes"


def peaks_of(mesh: RunningMesh, job: str, target: Path) -> dict[str, int]:
    """The most memory that each process has of its own while the result is fetched into a file, and by a web client."""
    watched = {name: pid for name, pid in mesh.processes().items() if name != "nats"}
    peaks = dict.fromkeys([*watched, "edif fetch"], 0)

    def look() -> None:
        for name, pid in watched.items():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                own = sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem")))
                peaks[name] = max(peaks[name], own)

    fetch = fetching(mesh.home, job, target)
    watched["edif fetch"] = fetch.pid
    while fetch.poll() is None:
        look()
    assert fetch.returncode == 0
    client = threading.Thread(target=lambda: downloaded(mesh, job))
    client.start()
    while client.is_alive():
        look()
        client.join(0.01)
    return peaks


def downloaded(mesh: RunningMesh, job: str) -> None:
    url = httpx.get(f"{mesh.gateway_url}/response/{job}", timeout=120).json()["data"]
    with httpx.stream("GET", url, timeout=120) as answer:
        for _ in answer.iter_raw(1 << 20):
            pass


def test_a_result_outlives_the_site_that_made_it(mesh: RunningMesh, tmp_path: Path) -> None:
    import torch

    from edif_mesh.results.archive import read

    job = finished(mesh, 30)
    for process in mesh.family("site-ansbach"):
        process.kill()
    assert fetching(mesh.home, job, tmp_path / "c.edif").wait(60) == 0
    assert torch.equal(read(tmp_path / "c.edif")["big"], torch.ones(30 << 18))
