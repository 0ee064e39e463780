"""A deletion that was asked for comes to its end, whoever is away or dies meanwhile; real processes, a real broker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_mesh.client.blocking import BlockingMesh
from edif_mesh.errors import NoReplyError, NotConnectedError
from tests.mesh import RunningMesh, running_mesh, until
from tests.models import tiny_gpt2
from tests.submitting import large_job

DELETED = "has deleted its payload, result and lines"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    with running_mesh(tmp_path_factory.mktemp("deletions"), tiny_gpt2(), sites=1) as mesh:
        yield mesh


def ended_job(client: BlockingMesh) -> str:
    job = client.submit(*large_job(8))  # large enough to be kept at the site, too
    job.result()
    return str(job.id)


def says(mesh: RunningMesh, job: str) -> str:
    """What the mesh says of the job; "" while coordinator or broker come up again."""
    try:
        with mesh.client() as client:
            return client.job(job).status().text
    except (NoReplyError, NotConnectedError):
        return ""


def deletions(mesh: RunningMesh, job: str) -> list[str]:
    return [what for what in mesh.audited(job) if what.startswith(("result deletion", "result deleted"))]


def of_sites(mesh: RunningMesh, job: str) -> list[Path]:
    return list((mesh.home / "sites").rglob(f"*{job}*"))


def kill_and_await(mesh: RunningMesh, name: str) -> None:
    """`kill -9`, and wait until the supervisor has started it again."""
    before = mesh.processes()[name]
    mesh.kill(name)
    assert until(lambda: mesh.processes()[name] != before, 30)


def test_a_site_that_was_away_deletes_when_it_is_back_although_the_coordinator_died_meanwhile(
    mesh: RunningMesh,
) -> None:
    with mesh.client() as client:
        job = ended_job(client)
    assert of_sites(mesh, job)
    agent = mesh.processes()["site-ansbach"]
    os.kill(agent, signal.SIGSTOP)
    try:
        done = mesh.edif("rm", job, "--yes")
        assert done.returncode == 0, done.stderr
        kill_and_await(mesh, "coordinator")
        assert (text := until(lambda: says(mesh, job)))
        assert DELETED not in text
        assert "result deleted at the broker" not in deletions(mesh, job)
    finally:
        os.kill(agent, signal.SIGCONT)
    assert until(lambda: DELETED in says(mesh, job)), says(mesh, job)
    assert deletions(mesh, job) == ["result deletion asked", "result deleted at a site", "result deleted at the broker"]
    assert of_sites(mesh, job) == []


def test_a_deletion_goes_on_at_a_site_that_was_killed(mesh: RunningMesh) -> None:
    with mesh.client() as client:
        job = ended_job(client)
        os.kill(mesh.processes()["site-ansbach"], signal.SIGSTOP)
        assert mesh.edif("rm", job, "--yes").returncode == 0
        kill_and_await(mesh, "site-ansbach")
    assert until(lambda: DELETED in says(mesh, job)), says(mesh, job)
    assert deletions(mesh, job)[-1] == "result deleted at the broker"
    assert of_sites(mesh, job) == []


def test_a_deletion_outlives_the_broker_s_death(mesh: RunningMesh) -> None:
    agent = mesh.processes()["site-ansbach"]
    with mesh.client() as client:
        job = ended_job(client)
        os.kill(agent, signal.SIGSTOP)
        try:
            client.job(job).delete()
            kill_and_await(mesh, "nats")
        finally:
            os.kill(agent, signal.SIGCONT)
    assert until(lambda: DELETED in says(mesh, job)), says(mesh, job)
    assert deletions(mesh, job).count("result deleted at the broker") == 1
