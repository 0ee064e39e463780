"""The demonstration: a whole mesh, a real experiment through unmodified nnsight, and the death of a site in its middle."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from edif_mesh.cli.render import say, table
from edif_mesh.cli.up import run_down, run_up
from edif_mesh.client.blocking import BlockingMesh
from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.job import JobStatus
from edif_mesh.errors import ConfigError, EdifError
from edif_mesh.local.supervisor import running_mesh
from edif_mesh.models import DEMO_MODEL, resolve_model
from edif_mesh.transport.embedded import free_port
from edif_mesh.wire.messages import JobSnapshot

KILL_AFTER_LINES = 8
_LIMIT_S = 900


def run_demo(*, output: Path, state: Path | None) -> int:
    """Start two sites, run, kill, compare with a local run, draw. Returns 0 only when everything held."""
    output.mkdir(parents=True, exist_ok=True)
    model = resolve_model(DEMO_MODEL)
    home = (state or output / "mesh").absolute()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(model.path.parent.parent.parent)}
    os.environ.update(environment)
    say(f"Starting a mesh of two sites, each with {DEMO_MODEL} ...")
    run_up(
        sites=2, models=(), port=free_port(), monitor_port=free_port(), slots=1, state=home, detach=True, json=False
    )  # fmt: skip
    try:
        remote, history = _run_remote(home, output, environment)
    finally:
        run_down(state=home, json=False)
    say("\nThe same script on this machine, without the mesh ...")
    local = _run_script(output / "local.pt", environment, local=True)
    return _report(output, remote, local, history)


def _run_remote(home: Path, output: Path, environment: dict[str, str]) -> tuple[dict[str, Any], JobSnapshot]:
    gateway = str(running_mesh(home)["gateway"])
    say(
        f"Running the experiment: NDIF_HOST={gateway} python -m edif_mesh.demo.patching (unmodified nnsight, remote=True)"
    )
    target = output / "remote.pt"
    target.unlink(missing_ok=True)
    script = subprocess.Popen(
        [sys.executable, "-m", "edif_mesh.demo.patching", str(target)],
        env={**environment, "NDIF_HOST": gateway},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with BlockingMesh(home / "client.toml") as mesh:
        job = _kill_its_site(mesh, home, script)
        try:
            _, errors = script.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            script.kill()
            raise ConfigError(f"The experiment did not end within {_LIMIT_S} s.") from None
        history = mesh.job(job).status()
    if script.returncode != 0:
        raise ConfigError(f"The experiment failed: {(errors.strip().splitlines() or ['no reason given'])[-1]}")
    return _load(target), history


def _kill_its_site(mesh: BlockingMesh, home: Path, script: subprocess.Popen[str]) -> str:
    """Wait until the long job has printed a few layers, then kill every process of its site with SIGKILL."""
    end = time.monotonic() + _LIMIT_S
    while time.monotonic() < end and script.poll() is None:
        running = [j for j in _jobs(mesh) if j.status is JobStatus.RUNNING and j.site is not None]
        for job in running:
            lines = mesh.job(job.job).logs()
            if len(lines) >= KILL_AFTER_LINES:
                say(f"  {job.job} runs at {job.site}: {''.join(lines[-1:]).strip()}")
                _kill_site(home, str(job.site))
                return job.job
        time.sleep(0.1)
    _, errors = script.communicate()
    last = (errors.strip().splitlines() or ["no reason given"])[-1]
    raise ConfigError(f"The experiment ended before a site could be killed under it: {last}")


def _jobs(mesh: BlockingMesh) -> tuple[JobSnapshot, ...]:
    try:
        return mesh.jobs(5)
    except EdifError:
        return ()


def _kill_site(home: Path, site: str) -> None:
    processes = running_mesh(home)["processes"]
    assert isinstance(processes, dict)
    agent = psutil.Process(int(processes[f"site-{site}"]))
    family = [agent, *agent.children(recursive=True)]
    for process in family:
        process.kill()
    say(f"  kill -9: all {len(family)} processes of {site} (agent, model host, runners).")


def _run_script(target: Path, environment: dict[str, str], *, local: bool) -> dict[str, Any]:
    arguments = ["--local"] if local else []
    done = subprocess.run(
        [sys.executable, "-m", "edif_mesh.demo.patching", str(target), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ConfigError(f"The local run failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return _load(target)


def _report(output: Path, remote: dict[str, Any], local: dict[str, Any], history: JobSnapshot) -> int:
    import torch

    say("\nWhat became of the job:")
    table(
        ("ATTEMPT", "SITE", "STATE", "BEGAN", "ENDED", "WHY"),
        [
            (
                str(a.attempt),
                a.site,
                a.status.value,
                f"{(a.granted_at_ms - history.submitted_at_ms) / 1000:.1f} s",
                f"{((a.ended_at_ms or a.granted_at_ms) - history.submitted_at_ms) / 1000:.1f} s",
                a.failure.text if a.failure else "",
            )
            for a in history.attempts
        ],
        empty="",
    )
    restored, words = remote["restored"], remote["words"]["clean"]
    say(
        "\nShare of the fact that one patched position restores (best layer), and what each layer would say (logit lens):"
    )
    best = restored.max(dim=0)
    table(
        ("POSITION", "TOKEN", "RESTORED", "AT LAYER"),
        [
            (str(i), repr(word), f"{best.values[i].item():.2f}", str(best.indices[i].item() + 1))
            for i, word in enumerate(words)
        ],
        empty="",
    )
    say("Logit lens, last layers: " + ", ".join(repr(word) for word in remote["lens"][-6:]))
    picture = _draw(restored, remote["words"], output / "patching.png")
    equal = (
        all(torch.equal(remote[name], local[name]) for name in ("restored", "gaps")) and remote["lens"] == local["lens"]
    )
    lost = [a for a in history.attempts if a.status is AttemptStatus.LOST]
    say(f"\nValues equal to the local run: {'yes, bit for bit' if equal else 'NO'}.")
    say(f"Site killed under the job: {lost[0].site if lost else 'NO'}; finished at: {history.site}.")
    say(f"Heat map: {picture}")
    return 0 if equal and lost and history.status is JobStatus.SUCCEEDED else 1


def _draw(restored: Any, words: dict[str, list[str]], path: Path) -> Path | str:
    try:
        import matplotlib
    except ImportError:
        return "not drawn (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 7), layout="constrained")
    image = axes.imshow(restored.numpy(), aspect="auto", origin="lower", cmap="RdBu_r", vmin=-1, vmax=1)
    labels = [
        c if c == k else f"{c.strip()}\n({k.strip()})" for c, k in zip(words["clean"], words["corrupted"], strict=True)
    ]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("patched position: clean token (corrupted token)")
    axes.set_ylabel("patched layer (residual stream after it)")
    axes.set_yticks(range(0, restored.shape[0], 3), [str(n + 1) for n in range(0, restored.shape[0], 3)])
    axes.set_title("Where SmolLM2-135M keeps “Paris”: clean residual stream\npatched into the corrupted run")
    figure.colorbar(image, label="restored share of logit(Paris) - logit(Rome)")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _load(path: Path) -> dict[str, Any]:
    import torch

    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded
