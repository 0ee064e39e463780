"""Bad input, each kind with its sentence: nothing hangs, nothing is lost, and the next honest job runs."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from edif_mesh.cli import exit_codes
from edif_mesh.client.mesh import JobSpec
from edif_mesh.domain.job import JobStatus, Limits
from edif_mesh.domain.site import ModelRef, Versions
from edif_mesh.errors import JobCancelledError, JobFailedError, NotFoundError, RefusedError, UserCodeError
from tests.mesh import RunningMesh, environment, running_mesh, until
from tests.models import TINY, tiny_gpt2
from tests.traces import one_read, payload

CLIENT = Versions(python="3.11.7", nnsight="0.8.1")
SHORT = Limits(wall_ms=3_000, memory_bytes=300 << 20, result_bytes=1 << 20, log_bytes=64 << 10)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    with running_mesh(tmp_path_factory.mktemp("mesh"), tiny_gpt2(), sites=1) as mesh:
        yield mesh


@pytest.fixture(autouse=True)
def the_next_honest_job_runs(mesh: RunningMesh) -> Iterator[None]:
    yield
    with mesh.client() as client:
        result = client.submit(one_read(), spec()).result()
        assert len(result) == 1
        stuck = [j.job for j in client.jobs() if not j.status.terminal]
        assert stuck == []


def spec(**changes: Any) -> JobSpec:
    return dataclasses.replace(JobSpec(ModelRef(TINY), client=CLIENT, limits=SHORT), **changes)


def raises() -> bytes:
    def body(model: Any, capture: Any) -> None:
        with model.trace("Hello world", backend=capture):
            hidden = model.lm_head.output
            raise ValueError("my own mistake")

    return payload(body)


def unsupported() -> bytes:
    def body(model: Any, capture: Any) -> None:
        with model.trace("Hello world", backend=capture):
            found = {"inner": [lambda x: x]}.save()

    return payload(body)


def endless() -> bytes:
    def body(model: Any, capture: Any) -> None:
        with model.trace("Hello world", backend=capture):
            number = 0
            while True:
                number += 1

    return payload(body)


def greedy() -> bytes:
    def body(model: Any, capture: Any) -> None:
        import torch

        with model.trace("Hello world", backend=capture):
            hoard = []
            while True:
                hoard.append(torch.ones(4_000_000))

    return payload(body)


def too_much() -> bytes:
    def body(model: Any, capture: Any) -> None:
        import torch

        with model.trace("Hello world", backend=capture):
            large = torch.ones(1_000_000).save()

    return payload(body)


def module_missing() -> bytes:
    return b"\x80\x04c" + b"no_such_module_anywhere\nthing\n."


FAILURES: list[tuple[str, Callable[[], bytes], type[Exception], str, str]] = [
    (
        "garbage",
        lambda: b"this is no payload" * 50,
        JobFailedError,
        "bad_payload",
        "not a trace that nnsight can rebuild",
    ),
    ("another module", module_missing, JobFailedError, "bad_payload", "no_such_module_anywhere"),
    ("raises", raises, UserCodeError, "user_error", "ValueError: my own mistake"),
    ("unsupported", unsupported, JobFailedError, "unsupported_value", "'found['inner'][0]'"),
    ("endless", endless, JobFailedError, "wall_time", "its limit is 3.0 s"),
    ("greedy", greedy, JobFailedError, "out_of_memory", "limit"),
    ("too much", too_much, JobFailedError, "result_too_large", "this job may return 1.0 MB"),
]


@pytest.mark.parametrize(("make", "kind", "code", "sentence"), [f[1:] for f in FAILURES], ids=[f[0] for f in FAILURES])
def test_a_bad_job_fails_once_with_a_sentence(
    mesh: RunningMesh, make: Callable[[], bytes], kind: type[Exception], code: str, sentence: str
) -> None:
    with mesh.client() as client:
        job = client.submit(make(), spec())
        with pytest.raises(kind) as raised:
            job.result()
        assert raised.value.code == code  # type: ignore[attr-defined]
        assert sentence in str(raised.value)
        assert len(client.job(job.id).status().attempts) == 1, "what is the job's own fault is not tried elsewhere"


def test_a_payload_that_grows_beyond_what_it_declared(mesh: RunningMesh) -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))
    with mesh.client() as client:
        job = client.submit(bomb, spec(compressed=True, uncompressed_bytes=1 << 20))
        with pytest.raises(JobFailedError, match="when decompressed"):
            job.result()


def test_a_million_lines_are_cut_with_a_sentence_and_the_job_ends_well(mesh: RunningMesh) -> None:
    def body(model: Any, capture: Any) -> None:
        with model.trace("Hello world", backend=capture):
            logits = model.lm_head.output.save()
            for number in range(1_000_000):
                print("line", number)

    with mesh.client() as client:
        job = client.submit(payload(body), spec(limits=dataclasses.replace(SHORT, wall_ms=60_000)))
        assert set(job.result()) == {"logits"}
        text = "".join(job.logs())
        assert text.startswith("line 0")
        assert "output limit" in text
        assert len(text) < 200_000


REFUSALS: list[tuple[str, dict[str, Any], str, str]] = [
    ("unknown model", {"model": ModelRef("nobody/nothing")}, "unknown_model", TINY),
    ("revision", {"model": ModelRef(TINY, "0" * 40)}, "revision", "only as"),
    ("too large", {"limits": Limits(memory_bytes=60 << 30)}, "too_large", "GB for runners"),
    ("limits", {"limits": Limits(wall_ms=10 * 3_600_000)}, "limits", "seconds of run time"),
    ("old nnsight", {"client": Versions(nnsight="0.4.9")}, "versions", "pip install -U"),
    ("long validity", {"valid_ms": 30 * 86_400_000}, "window", "7 days"),
]


@pytest.mark.parametrize(("changes", "code", "sentence"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_can_never_run_is_refused_at_once(
    mesh: RunningMesh, changes: dict[str, Any], code: str, sentence: str
) -> None:
    with mesh.client() as client:
        job = client.submit(one_read(), spec(**changes))
        with pytest.raises(RefusedError) as raised:
            job.result()
        assert raised.value.code == code
        assert sentence in str(raised.value)


def test_a_cancelled_job_frees_its_slot(mesh: RunningMesh) -> None:
    with mesh.client() as client:
        jobs = [client.submit(endless(), spec(limits=dataclasses.replace(SHORT, wall_ms=600_000))) for _ in range(2)]
        assert until(lambda: all(j.status().status is JobStatus.RUNNING for j in jobs), 30)
        for job in jobs:
            assert job.cancel().status is JobStatus.CANCELLED
            with pytest.raises(JobCancelledError):
                job.result()
        assert until(lambda: client.view().sites[0].free_slots == 2, 10)


def test_a_job_that_is_not_there(mesh: RunningMesh) -> None:
    with mesh.client() as client:
        with pytest.raises(NotFoundError):
            client.job("j" + "0" * 23).status()
        with pytest.raises(NotFoundError, match="no job id"):
            client.job("../../etc/passwd")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["show", "j" + "0" * 23], exit_codes.NOT_FOUND, "There is no job"),
        (["show", "nonsense"], exit_codes.NOT_FOUND, "no job id"),
        (["fetch", "j" + "0" * 23, "-o", "x.txt"], exit_codes.USAGE, ".safetensors"),
        (["run", "no-such-script.py"], exit_codes.NOT_FOUND, "There is no script"),
        (["up", "--model", "nobody/nothing", "--state", "STATE"], exit_codes.NOT_FOUND, "hf download nobody/nothing"),
        (["up", "--model", TINY, "--state", "HOME", "--port", "0"], exit_codes.USAGE, "edif down"),
        (["down", "--state", "STATE"], exit_codes.NOT_FOUND, "edif up"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_its_exit_code(
    mesh: RunningMesh, arguments: list[str], code: int, sentence: str, tmp_path: Path
) -> None:
    given = [str(tmp_path) if a == "STATE" else str(mesh.home) if a == "HOME" else a for a in arguments]
    done = mesh.edif(*given)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named(mesh: RunningMesh, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = mesh.edif("up", "--model", TINY, "--state", str(tmp_path), "--port", port)
    assert done.returncode == exit_codes.USAGE
    assert f"Port {port}" in done.stderr


def test_without_a_mesh_the_command_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edif_mesh.cli", "status"]
    settings = environment(EDIF_HOME=str(tmp_path))
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == exit_codes.USAGE
    assert "client.toml" in done.stderr
