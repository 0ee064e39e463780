"""Every command against a real mesh, as a researcher and as a script sees it: words, documents, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from edif_mesh.domain.job import JobStatus
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import Identity, TrustStore
from edif_mesh.results.archive import read
from edif_mesh.transport.embedded import free_port
from edif_mesh.wire.messages import Role
from tests.mesh import ROOT, RunningMesh, environment, running_mesh, until
from tests.models import tiny_gpt2
from tests.submitting import load, payload_that_beats

SCRIPT = """
import sys
from nnsight import TransformersModel
model = TransformersModel(sys.argv[1], task="text-generation")
with model.trace("hello world", remote=True):
    print("inside the trace")
    logits = model.lm_head.output.save()
    words = "not a tensor"; save = __import__("nnsight").save(words)
print("shape", tuple(logits.shape), sys.argv[2:], __file__)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    with running_mesh(tmp_path_factory.mktemp("mesh"), tiny_gpt2(), sites=1) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scripts") / "experiment.py"
    file.write_text(SCRIPT)
    return file


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    model = load(tiny_gpt2())
    with model.trace("hello world"):
        logits = model.lm_head.output.save()
    return logits.detach()


@pytest.fixture(scope="module")
def submitted(mesh: RunningMesh, script: Path) -> str:
    """A job that `edif submit` has sent; its id."""
    done = mesh.edif("submit", str(script), tiny_gpt2())
    assert done.returncode == 0, done.stderr
    (job,) = done.stdout.split()
    assert "needs a result. 1 job(s) sent." in done.stderr
    assert "line 9" in done.stderr
    return job


def document(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document that a command printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_run_gives_the_script_its_values_arguments_and_exit_code(mesh: RunningMesh, script: Path) -> None:
    done = mesh.edif("run", str(script), tiny_gpt2(), "--flag", "value")
    assert f"shape (1, 2, 512) ['--flag', 'value'] {script}" in done.stdout, done.stdout + done.stderr
    assert "inside the trace" in done.stdout + done.stderr
    assert done.returncode == 7


def test_run_passes_on_how_a_script_was_killed(mesh: RunningMesh, tmp_path: Path) -> None:
    file = tmp_path / "dies.py"
    file.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert mesh.edif("run", str(file)).returncode == 128 + signal.SIGKILL


def test_a_script_s_limits_are_set_for_its_jobs_and_the_receipt_shows_what_was_used(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    file = tmp_path / "endless.py"
    file.write_text(SCRIPT.replace('    words = "not a tensor"', "    while True: pass\n    words = 1"))
    done = mesh.edif("run", "--limit", "wall=700ms", "--limit", "log=1KB", str(file), tiny_gpt2())
    assert done.returncode == 1
    assert "its limit is 0.7 s" in done.stderr
    assert "wall_ms" in done.stderr
    job = document(mesh.edif("jobs", "--json"))[0]["job"]
    shown = mesh.edif("status", job)
    assert shown.returncode == 0, shown.stderr
    assert re.search(
        r"Receipt of attempt 1, by \w+: \d\.\d\d s run time, \d\.\d\d s processor time on cpu, \d+\.\d MB memory at its highest, "
        r"0\.0 MB result, 17 bytes printed, in the sandbox \w+\.",
        shown.stdout,
    ), shown.stdout
    with mesh.client() as client:
        receipt = client.job(job).receipt()
        assert receipt is not None
        assert receipt.wall_ms >= 700
    refused = mesh.edif("run", "--limit", "wall=soon", str(file))
    assert refused.returncode == 2
    assert "wall=90min" in refused.stderr


def test_how_the_results_of_one_script_travel_is_said_with_it(mesh: RunningMesh, script: Path) -> None:
    settings = ("--result", "sealed", "--result", "wire_dtype=float16", "--result", "compression=best")
    done = mesh.edif("run", *settings, str(script), tiny_gpt2())
    assert "shape (1, 2, 512)" in done.stdout, done.stdout + done.stderr
    with mesh.client() as client:
        job = client.mesh.job(document(mesh.edif("jobs", "--json"))[0]["job"])
        order, manifest = job.order(), job.verified_manifest(client.run(job.status()))
    assert order is not None
    assert (order.results.wire_dtype, order.results.compression) == ("float16", "best")
    assert manifest.sealed_key
    for wrong, says in (("compression=zip", "auto, off, fast, best"), ("seal", "There is no setting 'seal'")):
        refused = mesh.edif("run", "--result", wrong, str(script))
        assert refused.returncode == 2
        assert says in refused.stderr


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()


def test_run_spares_a_script_the_wait_for_a_hub_that_does_not_answer(mesh: RunningMesh, tmp_path: Path) -> None:
    file = tmp_path / "asks.py"
    file.write_text("import os\nprint('offline', os.environ['HF_HUB_OFFLINE'])\n")
    done = mesh.edif("run", str(file), HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert "offline 1" in done.stdout, done.stderr
    assert "hub does not answer" in done.stderr
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        done = mesh.edif("run", str(file), HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
        hub.shutdown()
    assert "offline 0" in done.stdout, done.stderr
    assert "hub" not in done.stderr


def test_run_starts_a_gateway_of_its_own_when_ours_is_not_there(
    mesh: RunningMesh, script: Path, tmp_path: Path
) -> None:
    home = another_home(mesh, tmp_path, gateway_port=free_port())
    done = edif_at(home, "run", str(script), tiny_gpt2())
    assert "shape (1, 2, 512)" in done.stdout, done.stdout + done.stderr
    seen = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]  # None for one that ends
    assert [command for command in seen if str(home) in " ".join(command)] == []


def test_run_uses_no_gateway_that_signs_in_another_name(mesh: RunningMesh, script: Path, tmp_path: Path) -> None:
    """Another mesh's gateway listens on the same port: the script must not send its jobs there."""
    port = int(mesh.gateway_url.rpartition(":")[2])
    home = another_home(mesh, tmp_path, gateway_port=port, key="keys/stranger.pem")
    done = edif_at(home, "run", str(script), tiny_gpt2())
    assert done.returncode not in (0, 7), "the job went through the other gateway"
    assert "No enrolled identity owns the key" in done.stderr, done.stderr[-600:]


def test_submitted_jobs_are_listed_shown_explained_and_fetched(
    mesh: RunningMesh, submitted: str, expected: torch.Tensor, tmp_path: Path
) -> None:
    target = tmp_path / "result.safetensors"
    fetched = mesh.edif("fetch", submitted, "-o", str(target))
    assert fetched.returncode == 0, fetched.stderr
    assert "verified" in fetched.stdout
    assert "Left out, because they are no tensors: save, words" in fetched.stdout
    assert torch.equal(load_file(target)["logits"], expected)

    everything = tmp_path / "result.edif"
    said = document(mesh.edif("fetch", submitted, "-o", str(everything), "--json"))
    assert said["bytes"] == everything.stat().st_size
    values = read(everything.read_bytes())
    assert torch.equal(values["logits"], expected)
    assert values["save"] == "not a tensor"

    listed = document(mesh.edif("jobs", "--json"))
    assert (submitted, "SUCCEEDED") in [(job["job"], job["status"]) for job in listed]
    assert f"{submitted}  SUCCEEDED" in mesh.edif("jobs").stdout

    shown = document(mesh.edif("show", submitted, "--json"))
    assert [(a["site"], a["status"]) for a in shown["attempts"]] == [("ansbach", "SUCCEEDED")]
    assert "Succeeded at ansbach (attempt 1)." in mesh.edif("show", submitted).stdout

    with mesh.client() as client:
        receipt = client.job(submitted).receipt()
        assert receipt is not None
        assert receipt.result_bytes == everything.stat().st_size

    why = document(mesh.edif("why", submitted, "--json"))
    assert [verdict["site"] for verdict in why] == ["ansbach"]
    assert "ansbach" in mesh.edif("why", submitted).stdout

    assert mesh.edif("logs", submitted).stdout == "inside the trace\n"
    assert document(mesh.edif("logs", submitted, "--json")) == {"job": submitted, "lines": ["inside the trace"]}


def test_a_result_that_cannot_be_written_is_a_sentence_and_leaves_no_half_file(
    mesh: RunningMesh, submitted: str, tmp_path: Path
) -> None:
    for name in ("result.safetensors", "result.edif"):
        folder = tmp_path / name  # a folder is in the way
        folder.mkdir()
        done = mesh.edif("fetch", submitted, "-o", str(folder))
        assert done.returncode == 2
        assert done.stderr.strip() == f"{folder} is a folder; name a file."
    if os.geteuid() == 0:
        return  # root may write everywhere
    tmp_path.chmod(0o500)
    for name in ("new.safetensors", "new.edif"):
        done = mesh.edif("fetch", submitted, "-o", str(tmp_path / name))
        assert done.returncode in (1, 2)
        assert "ermission denied" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_under_a_fetch_is_a_sentence(mesh: RunningMesh, submitted: str, tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine mounts nothing")
    try:
        (tmp_path / "full").write_bytes(b"x" * 15_000)
        for name in ("new.safetensors", "new.edif"):
            done = mesh.edif("fetch", submitted, "-o", str(tmp_path / name), "--json")
            assert done.returncode == 1
            assert "No space left" in json.loads(done.stdout)["error"]["text"]
            assert "Traceback" not in done.stderr
            assert not (tmp_path / name).exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_status_sites_and_models_say_the_same_to_people_and_programs(mesh: RunningMesh) -> None:
    view = document(mesh.edif("status", "--json"))
    assert view["federation"] == "local"
    assert [site["site"] for site in view["sites"]] == ["ansbach"]
    told = mesh.edif("status").stdout
    assert "Federation local" in told
    assert mesh.monitor_url in told
    assert "2 of 2" in told

    (site,) = document(mesh.edif("sites", "--json"))
    assert site["sandbox"]
    assert site["versions"]["nnsight"]
    assert "ansbach" in mesh.edif("sites").stdout

    (offer,) = document(mesh.edif("models", "list", "--json"))
    assert offer["model"]["repo_id"] == tiny_gpt2()
    assert offer["model"]["weights_bytes"] > 100_000
    told = mesh.edif("models", "list").stdout
    assert tiny_gpt2() in told
    assert "LOADED" in told
    assert "sdpa" in told
    assert offer["model"]["memory_bytes"] > offer["model"]["weights_bytes"]
    assert f"of {site['models_bytes'] / 1e9:.1f} GB" in mesh.edif("sites").stdout


def test_a_running_job_is_followed_and_cancelled(mesh: RunningMesh) -> None:
    payload, spec = payload_that_beats(tiny_gpt2(), beats=600)
    with mesh.client() as client:
        job = client.submit(payload, spec).id
        follower = subprocess.Popen(
            [sys.executable, "-m", "edif_mesh.cli", "logs", "-f", job],
            env=environment(EDIF_HOME=str(mesh.home)),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert follower.stdout is not None
        assert follower.stdout.readline() == "beat 0\n"
        cancelled = document(mesh.edif("cancel", job, "--reason", "tea is ready", "--json"))
        assert cancelled["status"] == "CANCELLED"
        assert follower.wait(30) == 0
        follower.stdout.close()
        assert client.job(job).wait().status is JobStatus.CANCELLED
    again = mesh.edif("cancel", job)
    assert (again.returncode, again.stdout.strip()) == (0, f"{job}: Cancelled: tea is ready.")
    fetched = mesh.edif("fetch", job, "-o", "x.edif")
    assert fetched.returncode == 1
    assert "tea is ready" in fetched.stderr


def test_an_error_of_the_researcher_s_own_is_their_traceback(mesh: RunningMesh, tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(SCRIPT.replace("model.lm_head.output.save()", "(model.lm_head.output + 'apples').save()"))
    ran = mesh.edif("run", str(file), tiny_gpt2())
    assert ran.returncode == 1
    assert "TypeError" in ran.stderr
    (job,) = mesh.edif("submit", str(file), tiny_gpt2()).stdout.split()
    fetched = mesh.edif("fetch", job, "-o", str(tmp_path / "x.edif"))
    assert fetched.returncode == 1
    assert f'File "{file}", line 7' in fetched.stderr
    assert "edif_mesh/cli" not in fetched.stderr, "our own traceback is not theirs to read"
    assert "FAILED" in mesh.edif("show", job).stdout


def test_a_script_s_own_error_under_submit_is_not_hidden(mesh: RunningMesh, tmp_path: Path) -> None:
    file = tmp_path / "early.py"
    file.write_text("print(undefined)\n")
    done = mesh.edif("submit", str(file))
    assert done.returncode == 1
    assert "NameError" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["show", "j0192f3c4d5e6a1b2c3d4e5f"], 4, "There is no job j0192f3c4d5e6a1b2c3d4e5f of yours here."),
        (["show", "nonsense"], 4, "'nonsense' is no job id"),
        (["cancel", "j0192f3c4d5e6a1b2c3d4e5f"], 4, "There is no job"),
        (["logs", "j0192f3c4d5e6a1b2c3d4e5f"], 4, "There is no job"),
        (["fetch", "j0192f3c4d5e6a1b2c3d4e5f", "-o", "x.edif"], 4, "There is no job"),
        (["fetch", "j0192f3c4d5e6a1b2c3d4e5f", "-o", "x.pickle"], 2, "choose a name that ends in .safetensors"),
        (["fetch", "j0192f3c4d5e6a1b2c3d4e5f", "-o", "nowhere/x.edif"], 2, "The folder nowhere does not exist."),
        (["run", "nowhere.py"], 4, "There is no script nowhere.py."),
    ],
)
def test_what_is_not_there_is_a_sentence_and_a_code(
    mesh: RunningMesh, arguments: list[str], code: int, says: str
) -> None:
    done = mesh.edif(*arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, "one sentence, nothing else"
    assert done.stdout == ""
    if arguments[0] != "run":
        told = mesh.edif(*arguments, "--json")
        assert told.returncode == code
        assert says in json.loads(told.stdout)["error"]["text"]
        assert told.stderr == ""


@pytest.mark.parametrize("command", [["status"], ["run", __file__]])
def test_a_mesh_out_of_reach_is_code_3(mesh: RunningMesh, tmp_path: Path, command: list[str]) -> None:
    home = another_home(mesh, tmp_path, gateway_port=free_port(), broker_port=free_port())
    done = edif_at(home, *command)
    assert done.returncode == 3, done.stderr
    assert "cannot be reached" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_a_mesh_it_says_how_to_start_one(tmp_path: Path) -> None:
    done = edif_at(tmp_path, "status")
    assert done.returncode == 2
    assert f"There is no settings file {tmp_path}/client.toml. Start a local mesh with `edif up`" in done.stderr


def test_a_coordinator_that_is_silent_is_code_3_and_a_sentence(mesh: RunningMesh) -> None:
    pid = mesh.processes()["coordinator"]
    os.kill(pid, signal.SIGSTOP)
    try:
        done = mesh.edif("status")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 3
    assert done.stderr.strip() == "No coordinator answers at present. It may be restarting; your jobs are kept."
    assert until(lambda: mesh.edif("status").returncode == 0)


def test_a_reader_that_goes_away_is_no_traceback(mesh: RunningMesh) -> None:
    for command in ("sites", "sites --json", "jobs --json"):
        line = f"{sys.executable} -m edif_mesh.cli {command} | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", line], env=environment(EDIF_HOME=str(mesh.home)), capture_output=True, text=True, timeout=60
        )
        assert done.stderr == "", command


def test_the_result_of_a_stranger_s_job_is_not_found(mesh: RunningMesh, submitted: str, tmp_path: Path) -> None:
    """Another enrolled researcher learns nothing, not even that the job exists."""
    home = another_home(mesh, tmp_path, gateway_port=free_port(), key="keys/second.pem", enrol=True)
    done = edif_at(home, "show", submitted)
    assert done.returncode == 4, done.stderr
    assert done.stderr.strip() == f"There is no job {submitted} of yours here."
    assert json.loads(edif_at(home, "jobs", "--json").stdout) == []


def test_help_names_every_command_and_the_exit_codes() -> None:
    told = edif_at(ROOT, "--help").stdout
    names = "up down status sites models jobs show why cancel logs fetch run submit demo"
    for command in names.split():
        assert f"\n  {command} " in told
        assert edif_at(ROOT, command, "--help").returncode == 0
    assert "2 wrong usage or settings, 3 mesh not reachable, 4 not found" in " ".join(told.split())
    assert edif_at(ROOT, "no-such-command").returncode == 2
    assert edif_at(ROOT, "jobs", "--limit", "0").returncode == 2


def edif_at(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edif_mesh.cli", *arguments]
    settings = environment(EDIF_HOME=str(home), COLUMNS="200")
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=90, cwd=home)


def another_home(
    mesh: RunningMesh, home: Path, *, gateway_port: int, broker_port: int = 0, key: str = "", enrol: bool = False
) -> Path:
    """The settings of a second researcher's machine in the same mesh; with `key`, with a key of their own."""
    text = (mesh.home / "client.toml").read_text()
    lines = []
    for line in text.splitlines():
        name = line.partition(" =")[0]
        if name == "gateway_port":
            line = f"gateway_port = {gateway_port}"
        if name == "url" and broker_port:
            line = f"url = 'nats://127.0.0.1:{broker_port}'"
        if name == "key_file":
            line = f"key_file = '{home / key}'" if key else f"key_file = '{mesh.home}/keys/researcher.pem'"
        if name in ("trust_file", "password_file"):
            line = f"{name} = '{mesh.home}/{line.partition(chr(39))[2].rstrip(chr(39))}'"
        lines.append(line)
    (home / "client.toml").write_text("\n".join(lines) + "\n")
    if key:
        own = PrivateKey.generate()
        own.save(home / key)
        if enrol:
            who = Identity(own.public.hex(), Role.RESEARCHER, "second@local", "local")
            for file in (mesh.home / "coordinator" / "trust.json", mesh.home / "sites" / "ansbach" / "trust.json"):
                TrustStore.load(file).enrol(who)
    return home
