"""Results on a real mesh: seen while the job runs, compressed, sealed, shared, fetched in part, deleted everywhere."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from edif_mesh.client.backend import capture
from edif_mesh.client.mesh import JobSpec, Mesh
from edif_mesh.config import ClientConfig, CoordinatorConfig, load_config, read_password
from edif_mesh.domain.ids import AttemptNumber
from edif_mesh.domain.job import JobStatus
from edif_mesh.errors import ConfigError, RefusedError, ResultGoneError
from edif_mesh.results.archive import read
from edif_mesh.transport.nats_bus import connect
from edif_mesh.wire import subjects
from tests import traces
from tests.mesh import RunningMesh, environment, running_mesh
from tests.models import tiny_gpt2
from tests.raw_client import RawClient
from tests.raw_client import load as loaded
from tests.same_values import assert_same
from tests.submitting import load

CANARY = 0x5EC12E7C0DE51234


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    with running_mesh(tmp_path_factory.mktemp("results"), tiny_gpt2(), sites=1) as mesh:
        yield mesh


@pytest.fixture
def client(mesh: RunningMesh) -> Path:
    return mesh.home / "client.toml"


def a_job(body: Callable[[Any, Any], None], **options: Any) -> tuple[bytes, JobSpec]:
    """The payload of a block, `body(model, backend)`, and the spec for it."""
    model = load(tiny_gpt2())
    captured: list[tuple[bytes, JobSpec]] = []
    body(model, lambda tracer: captured.append(capture(tracer, model, **options)))
    return captured[0]


def activations(model: Any, backend: Any) -> None:
    """4 MB that look like activations, the same every time, and 100 bytes that do not."""
    with model.trace("hello world", backend=backend):
        import torch

        acts = (torch.randn(1000, 1000, generator=torch.Generator().manual_seed(3)) * 0.02).save()
        small = torch.arange(25).save()


def wanted() -> dict[str, torch.Tensor]:
    return {
        "acts": torch.randn(1000, 1000, generator=torch.Generator().manual_seed(3)) * 0.02,
        "small": torch.arange(25),
    }


def with_canary(model: Any, backend: Any) -> None:
    with model.trace("hello world", backend=backend):
        import torch

        secret = torch.full((2000,), 0x5EC12E7C0DE51234, dtype=torch.int64).save()


def endless(model: Any, backend: Any) -> None:
    with model.trace("hello world", backend=backend):
        import time

        import torch

        acts = [].save()
        first = torch.full((100_000,), 1.0).save()
        acts.append(torch.full((10,), 2.0))
        while True:
            time.sleep(0.01)


def found_in(folder: Path, needle: bytes) -> list[str]:
    """The files below `folder` that hold these bytes."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]


async def test_values_are_seen_while_their_job_runs(client: Path) -> None:
    async with await Mesh.connect(client) as mesh:
        job = await mesh.submit(*a_job(endless))
        seen: dict[str, torch.Tensor] = {}
        async with asyncio.timeout(60):
            async for name, value in job.live():
                seen[name] = value
                if len(seen) == 2:
                    break
        assert_same(
            dict(sorted(seen.items())), {"acts[0]": torch.full((10,), 2.0), "first": torch.full((100_000,), 1.0)}
        )
        assert (await job.status()).status is JobStatus.RUNNING
        late = mesh.job(job.id)  # who comes later sees them too
        async with asyncio.timeout(60):
            async for name, value in late.live():
                assert_same(value, seen[name])
                break
        with pytest.raises(RefusedError, match="Cancel it first"):
            await job.delete()
        await job.cancel()
        assert (await job.wait()).status is JobStatus.CANCELLED
        async with asyncio.timeout(30):  # what had left early is not kept for nobody
            while await mesh.streams.subjects(subjects.RESULTS_STREAM, subjects.result_chunks(job.id)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_activations_are_stored_in_fewer_bytes_and_come_back_to_the_bit(client: Path) -> None:
    async with await Mesh.connect(client) as mesh:
        sizes = {}
        for setting in ("off", "fast", "best"):
            mesh.session = setting  # nothing is shared
            job = await mesh.submit(*a_job(activations, compression=setting))
            assert_same(await job.result(), wanted())
            sizes[setting] = job.verified_manifest(await job.status()).stored_bytes
        assert sizes["fast"] < 0.95 * sizes["off"]
        assert sizes["best"] < 0.95 * sizes["off"]


@pytest.mark.parametrize(("dtype", "part"), [("float16", 0.55), ("bfloat16", 0.55), ("int8", 0.3)])
async def test_a_wire_dtype_costs_digits_and_saves_bytes(client: Path, dtype: str, part: float) -> None:
    async with await Mesh.connect(client) as mesh:
        job = await mesh.submit(*a_job(activations, wire_dtype=dtype, compression="off"))
        values = await job.result()
        assert values["acts"].dtype is torch.float32
        assert torch.equal(values["small"], wanted()["small"])
        assert 0 < float((values["acts"] - wanted()["acts"]).abs().max()) < 0.001
        assert job.verified_manifest(await job.status()).stored_bytes < part * 4_000_000


async def test_an_unknown_setting_is_refused_before_anything_is_sent(client: Path) -> None:
    async with await Mesh.connect(client) as mesh:
        payload, spec = a_job(activations, compression="zip")
        with pytest.raises(ConfigError, match="auto, off, fast, best"):
            await mesh.submit(payload, spec)
        payload, spec = a_job(activations, wire_dtype="int4")
        with pytest.raises(ConfigError, match="float16, bfloat16, int8"):
            await mesh.submit(payload, spec)


async def test_a_sealed_result_is_nowhere_in_clear_and_opens_for_its_key_from_anywhere(
    mesh: RunningMesh, client: Path, tmp_path: Path
) -> None:
    needle = CANARY.to_bytes(8, "little") * 4
    async with await Mesh.connect(client) as connected:
        job = await connected.submit(*a_job(with_canary, sealed=True, compression="off"))
        assert_same(await job.result(), {"secret": torch.full((2000,), CANARY)})
    assert found_in(mesh.home, needle) == []
    other = client.parent / "other.toml"
    other.write_text(client.read_text().replace('outbox_dir = "', 'outbox_dir = "another-'))
    async with await Mesh.connect(other) as elsewhere:  # the same key on another machine: it has no order of it
        assert_same(await elsewhere.job(job.id).result(), {"secret": torch.full((2000,), CANARY)})
    async with await Mesh.connect(client) as connected:
        plain = await connected.submit(*a_job(with_canary, compression="off"))
        await plain.result()
    assert found_in(mesh.home, needle), "the canary would not have been found"


async def test_the_same_values_are_stored_once_in_a_session(client: Path) -> None:
    async with await Mesh.connect(client) as mesh:
        first = await mesh.submit(*a_job(activations))
        assert_same(await first.result(), wanted())
        second = await mesh.submit(*a_job(activations))
        assert_same(await second.result(), wanted())
        stored = [job.verified_manifest(await job.status()).stored_bytes for job in (first, second)]
        assert stored[1] < 0.05 * stored[0]
    async with await Mesh.connect(client) as elsewhere:
        again = elsewhere.job(second.id)
        assert_same(await again.result(), wanted())
        gone = await elsewhere.job(first.id).delete()
        assert f"its chunks go when {second.id}" in gone.text
        assert_same(await elsewhere.job(second.id).result(), wanted())
        await elsewhere.job(second.id).delete()
        await deleted(elsewhere, first.id)


def numbers(model: Any, backend: Any) -> None:
    with model.trace("hello world", backend=backend):
        found = list(range(30_000)).save()


async def test_a_result_that_stores_nothing_itself_outlives_the_one_it_borrows_from(client: Path) -> None:
    async with await Mesh.connect(client) as mesh:
        first = await mesh.submit(*a_job(numbers))
        await first.result()
        second = await mesh.submit(*a_job(numbers))
        await second.result()
        assert second.verified_manifest(await second.status()).stored_bytes == 0
    async with await Mesh.connect(without_direct_path(client)) as elsewhere:
        assert f"its chunks go when {second.id}" in (await elsewhere.job(first.id).delete()).text
        assert await elsewhere.job(second.id).result() == {"found": list(range(30_000))}


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from edif_mesh.client.mesh import Mesh

def die(done, of):
    if 0 < done < of:
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with await Mesh.connect(Path(sys.argv[1])) as mesh:
        await mesh.job(sys.argv[2]).fetch_to(Path(sys.argv[3]), progress=die)

asyncio.run(main())
"""


async def test_a_fetch_that_was_killed_is_gone_on_with_and_takes_nothing_twice(
    mesh: RunningMesh, client: Path, tmp_path: Path
) -> None:
    target = tmp_path / "result.edif"
    client = without_direct_path(client)
    async with await Mesh.connect(client) as connected:
        job = await connected.submit(*a_job(activations, compression="off"), follow=False)
        await job.wait()
        command = [sys.executable, "-c", KILLED, str(client), job.id, str(target)]
        killed = await asyncio.to_thread(subprocess.run, command, env=environment(), timeout=60)
        assert killed.returncode == -signal.SIGKILL
        assert not target.exists()
        there = [int(line.split()[0]) for line in target.with_name("result.edif.part.have").open() if line[0] != "{"]
        assert there
    await purge(mesh, *(subjects.result_chunk(job.id, AttemptNumber(1), number) for number in there))
    # What the killed one had cannot be had from the broker any more.
    async with await Mesh.connect(client) as connected:
        size = await connected.job(job.id).fetch_to(target)
    assert size == target.stat().st_size
    assert_same(dict(read(target.read_bytes())), wanted())
    assert [path.name for path in tmp_path.iterdir()] == ["result.edif"]


def without_direct_path(client: Path) -> Path:
    """The same settings, for a client that fetches from the broker only."""
    settings = client.with_name("broker-only.toml")
    text = client.read_text()
    settings.write_text(text.replace("[broker]", "[results]\ndirect = false\n\n[broker]", 1))
    assert not load_config(ClientConfig, settings).results.direct
    return settings


async def purge(mesh: RunningMesh, *names: str) -> None:
    """Have the broker forget what lies on these subjects of the results."""
    broker = load_config(CoordinatorConfig, mesh.home / "coordinator" / "coordinator.toml").broker
    connection = await connect(broker.url, name="test", user=broker.user, password=read_password(broker))
    try:
        for name in names:
            await connection.streams.purge(subjects.RESULTS_STREAM, name)
            assert await connection.streams.subjects(subjects.RESULTS_STREAM, name) == {}
    finally:
        await connection.close()


def test_the_gateway_gives_a_result_at_its_address_again_after_it_has_removed_the_file(mesh: RunningMesh) -> None:
    gateway = RawClient(mesh.gateway_url)
    job = gateway.submit(traces.large(5))
    address = gateway.poll(job)["data"]
    first = gateway.http.get(address).content
    (mesh.home / "gateway-results" / f"{job}.pt").unlink()
    assert gateway.http.get(address).content == first
    assert torch.equal(loaded(first)["big"], torch.ones(5 << 18))
    assert gateway.http.get(address[:-1] + ("A" if address[-1] != "A" else "B")).status_code == 404
    gateway.http.close()


async def test_of_a_lazy_result_only_what_is_indexed_comes(mesh: RunningMesh, client: Path) -> None:
    async with await Mesh.connect(client) as connected:
        job = await connected.submit(*a_job(activations, compression="off"), follow=False)
        await job.wait()
        with await connected.job(job.id).open() as result:
            assert dict(result.summary()) == {
                "acts": "float32 [1000, 1000], 4,000,000 bytes",
                "small": "int64 [25], 200 bytes",
            }
            assert result.fetched_bytes < 100_000
            assert_same(await result["acts"].at(3), wanted()["acts"][3])
            assert result.fetched_bytes < 1_100_000
            assert_same(result["small"], wanted()["small"])
    with mesh.client() as blocking, blocking.job(job.id).open() as result:
        assert_same(result["acts"][7, :5], wanted()["acts"][7, :5])
        assert result.fetched_bytes < 100_000  # the chunk was here from before
        assert_same(result["acts"].load(), wanted()["acts"])


def test_from_the_command_line_values_are_listed_and_taken_in_part(
    mesh: RunningMesh, client: Path, tmp_path: Path
) -> None:
    with mesh.client() as blocking:
        job = blocking.submit(*a_job(activations, compression="off"))
        job.wait()
    listed = json.loads(mesh.edif("show", job.id, "--values", "--json").stdout)
    assert listed["values"] == [
        {"name": "acts", "what": "float32 [1000, 1000], 4,000,000 bytes"},
        {"name": "small", "what": "int64 [25], 200 bytes"},
    ]
    assert listed["fetched_bytes"] < 100_000
    target = tmp_path / "part.safetensors"
    done = mesh.edif("fetch", job.id, "--only", "acts[3, :5]", "--only", "small", "-o", str(target))
    assert done.returncode == 0, done.stderr
    with safe_open(target, "pt") as file:
        assert_same(file.get_tensor("acts[3, :5]"), wanted()["acts"][3, :5].clone())
        assert_same(file.get_tensor("small"), wanted()["small"])
    done = mesh.edif("fetch", job.id, "--only", "acts[2000]", "-o", str(target))
    assert (done.returncode, "does not fit" in done.stderr) == (2, True), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.safetensors"]


async def deleted(mesh: Mesh, job: str) -> None:
    """Wait until nothing of a job is left at the broker, and its site has said so."""
    async with asyncio.timeout(30):
        while "has deleted its payload, result and lines" not in (await mesh.job(job).status()).text:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    for stream, subject in (
        (subjects.RESULTS_STREAM, subjects.result_chunks(mesh.job(job).id)),
        (subjects.PAYLOADS_STREAM, subjects.payload_chunks(mesh.job(job).id)),
        (subjects.LOGS_STREAM, subjects.all_log_lines(mesh.job(job).id)),
    ):
        assert await mesh.streams.subjects(stream, subject) == {}


async def test_what_is_deleted_is_gone_from_broker_and_cache_and_the_record_says_who_wanted_it(
    mesh: RunningMesh, client: Path
) -> None:
    async with await Mesh.connect(client) as connected:
        job = await connected.submit(*a_job(activations))
        with await job.open() as result:
            await result["acts"].at(0)
    listed = mesh.edif("jobs").stdout
    assert " MB until " in next(line for line in listed.splitlines() if job.id in line)
    done = mesh.edif("rm", job.id, "--yes")
    assert done.returncode == 0, done.stderr
    assert "Its owner has deleted" in done.stdout
    assert list((mesh.home / "cache").glob(f"{job.id}*")) == []
    async with await Mesh.connect(client) as connected:
        await deleted(connected, job.id)
        with pytest.raises(ResultGoneError, match="Run the job again"):
            await connected.job(job.id).result()
    assert mesh.edif("fetch", job.id, "-o", str(mesh.home / "x.edif")).returncode == 6
    assert "deleted" in next(line for line in mesh.edif("jobs").stdout.splitlines() if job.id in line)
    audit = mesh.audited(job.id)
    assert audit.count("result deletion asked") == audit.count("result deleted at the broker") == 1
    assert mesh.edif("rm", "j0192f3c4d5e6a1b2c3d4e5f6", "--yes").returncode in (4, 5)
