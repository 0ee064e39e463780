"""`kill -9` of every kind of process of a whole mesh while a job runs: the job ends well, once, and nothing is left."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from edif_mesh.client.blocking import BlockingJob, BlockingMesh
from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.job import JobStatus
from edif_mesh.errors import EdifError
from edif_mesh.wire.messages import JobSnapshot
from tests.mesh import RunningMesh, environment, running_mesh, until
from tests.models import tiny_gpt2

BEATS = 60
"""The job sleeps so often, a tenth of a second each: long enough to be killed under, short enough to wait for."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    with running_mesh(tmp_path_factory.mktemp("mesh"), tiny_gpt2()) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def job_parts() -> Any:
    """A payload that prints once a beat and saves the logits, and the logits of a local run."""
    return subprocess_capture()


def subprocess_capture() -> tuple[bytes, Any, torch.Tensor]:
    from nnsight import TransformersModel
    from nnsight.modeling import huggingface

    from edif_mesh.client.backend import capture
    from tests.models import cache

    folder = next((cache() / f"models--{tiny_gpt2().replace('/', '--')}" / "snapshots").iterdir())
    model = TransformersModel(str(folder), task="text-generation", dispatch=True)
    model.repo_id = tiny_gpt2()
    huggingface._ID_CACHE[model.repo_id] = model.repo_id
    captured: list[Any] = []

    class Capture:
        def __call__(self, tracer: Any) -> None:
            captured.append(capture(tracer, model))

    beats = BEATS
    with model.trace("hello world", backend=Capture()):
        import time

        logits = model.lm_head.output.save()
        for beat in range(beats):
            print("beat", beat)
            time.sleep(0.1)
    with model.trace("hello world"):
        expected = model.lm_head.output.save()
    payload, spec = captured[0]
    return payload, spec, expected.detach()


@contextlib.contextmanager
def a_running_job(mesh: RunningMesh, job_parts: Any) -> Iterator[tuple[BlockingMesh, BlockingJob, JobSnapshot]]:
    """Submit, and wait until it has printed something at some site."""
    payload, spec, _ = job_parts
    with mesh.client() as client:
        job = client.submit(payload, spec)
        until(lambda: job.status().status is JobStatus.RUNNING)
        assert until(job.logs, 30), job.status().text
        yield client, job, job.status()


def check_end(client: BlockingMesh, job: BlockingJob, expected: torch.Tensor) -> JobSnapshot:
    """It succeeded, exactly one attempt did, and the values are those of the local run."""
    values = job.result()
    assert torch.equal(values["logits"], expected)
    last = client.job(job.id).status()
    assert last.status is JobStatus.SUCCEEDED
    assert [a.status for a in last.attempts].count(AttemptStatus.SUCCEEDED) == 1
    assert last.attempts[-1].status is AttemptStatus.SUCCEEDED
    return last


def test_the_runner_dies(mesh: RunningMesh, job_parts: Any) -> None:
    with a_running_job(mesh, job_parts) as (client, job, running):
        for host in mesh.hosts(str(running.site)):
            for runner in host.children():
                runner.kill()
        last = check_end(client, job, job_parts[2])
        assert len(last.attempts) == 2
        assert last.attempts[0].failure is not None
        assert last.attempts[0].failure.code == "runner_crashed"


def test_the_model_host_dies(mesh: RunningMesh, job_parts: Any) -> None:
    with a_running_job(mesh, job_parts) as (client, job, running):
        for host in mesh.hosts(str(running.site)):
            host.kill()
        last = check_end(client, job, job_parts[2])
        assert len(last.attempts) == 2
    assert until(lambda: all_loaded(mesh)), "the host was not loaded again"


def test_the_site_dies_with_all_its_children(mesh: RunningMesh, job_parts: Any) -> None:
    with a_running_job(mesh, job_parts) as (client, job, running):
        mesh.kill_family(f"site-{running.site}")
        last = check_end(client, job, job_parts[2])
        assert last.attempts[0].status is AttemptStatus.LOST
        assert last.attempts[1].site != running.site
    assert until(lambda: all_loaded(mesh)), "the site did not come back"


def test_the_agent_alone_dies_and_takes_its_children_along(mesh: RunningMesh, job_parts: Any) -> None:
    with a_running_job(mesh, job_parts) as (client, job, running):
        family = mesh.family(f"site-{running.site}")
        mesh.kill(f"site-{running.site}")
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
        check_end(client, job, job_parts[2])
    assert until(lambda: all_loaded(mesh))


def test_the_coordinator_dies(mesh: RunningMesh, job_parts: Any) -> None:
    with a_running_job(mesh, job_parts) as (client, job, _):
        mesh.kill("coordinator")
        last = check_end(client, job, job_parts[2])
        assert len(last.attempts) == 1, "the coordinator's own absence must cost no attempt"


def test_the_broker_dies(mesh: RunningMesh, job_parts: Any) -> None:
    with a_running_job(mesh, job_parts) as (client, job, _):
        mesh.kill("nats")
        last = check_end(client, job, job_parts[2])
        assert len(last.attempts) == 1, "the broker's absence must cost no attempt"


def test_the_researcher_s_process_dies_and_the_result_is_fetched_later(mesh: RunningMesh, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), tiny_gpt2()],
        env=environment(NDIF_HOST=mesh.gateway_url),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with mesh.client() as client:
        job = until(lambda: next((j.job for j in client.jobs(3) if j.status is JobStatus.RUNNING), None), 60)
        assert job
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert client.job(job).wait().status is JobStatus.SUCCEEDED
    target = tmp_path / "result.safetensors"
    done = mesh.edif("fetch", job, "-o", str(target))
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    assert load_file(target)["logits"].shape[-1] == 512


SCRIPT = """
import sys
from nnsight import TransformersModel
from nnsight.modeling import huggingface
huggingface._ID_CACHE[sys.argv[1]] = sys.argv[1]
model = TransformersModel(sys.argv[1], task="text-generation")
with model.trace("hello world", remote=True):
    import time
    logits = model.lm_head.output.save()
    for beat in range(30):
        time.sleep(0.1)
"""


def all_loaded(mesh: RunningMesh) -> bool:
    """Whether every site is there with its model loaded."""
    with mesh.client() as client, contextlib.suppress(EdifError):
        view = client.view()
        return all(s.status == "ACTIVE" and all(m.state == "LOADED" for m in s.models) for s in view.sites)
    return False
