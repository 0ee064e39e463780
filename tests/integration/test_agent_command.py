"""`edif-site` as an operator meets it: check, start without a broker, a second start, wrong settings."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import models
from tests.contract.nats_starter import NatsServer
from tests.played_coordinator import ROOT, AgentProcess, Keys, a_site, play


def run(command: str, agent: AgentProcess) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "site_agent", command, "--config", str(agent.config)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=agent.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_check_says_one_line_a_finding_and_fails_without_a_broker(tmp_path: Path) -> None:
    models.tiny_gpt2()
    server = NatsServer(tmp_path)
    agent = AgentProcess(tmp_path, Keys(tmp_path), server)
    done = run("check", agent)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert all(line.split()[0] in {"ok", "warn", "fail"} for line in lines)
    assert [line for line in lines if line.startswith("fail")] == [line for line in lines if server.url in line]
    # On every machine that runs these tests the weakest profile holds; the site takes one that does.
    assert "ok   sandbox base holds" in lines
    assert (
        "ok   sandbox strict does not hold: no sandbox_command is configured, which would name the runtime around model hosts."
        in lines
    )
    assert len([line for line in lines if line.startswith("ok   Runners are confined by the profile")]) == 1
    server.start()
    try:
        assert run("check", agent).returncode == 0
    finally:
        server.kill()


def test_check_names_a_model_that_is_not_here_and_what_to_type(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path, Keys(tmp_path), NatsServer(tmp_path))
    agent.config.write_text(agent.config.read_text().replace(models.TINY, "nobody/nothing"))
    done = run("check", agent)
    assert "hf download nobody/nothing" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only an agent of root has runners with user ids of their own")
def test_check_warns_of_files_that_runners_cannot_read(tmp_path: Path) -> None:
    """An adapter is loaded by the runner, as another user, when a request asks for it: found out here, not then."""
    agent = AgentProcess(tmp_path, Keys(tmp_path), NatsServer(tmp_path))
    repo_id = models.tiny_gpt2()
    copied = tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(models.cache() / copied.name, copied, symlinks=True)
    agent.config.write_text(agent.config.read_text().replace(str(models.cache()), str(tmp_path / "hub")))
    assert "cannot load" not in run("check", agent).stdout
    secret = copied / "adapter_model.safetensors"
    secret.touch(0o600)
    assert f"warn runners have user ids of their own and cannot load {secret}" in run("check", agent).stdout


def test_a_wrong_federation_is_a_sentence(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path, Keys(tmp_path), NatsServer(tmp_path))
    agent.config.write_text(agent.config.read_text().replace('federation = "fed"', 'federation = "other"'))
    done = run("run", agent)
    assert done.returncode == 1
    assert "federation" in done.stderr
    assert "Traceback" not in done.stderr


async def test_an_agent_waits_for_a_broker_that_is_not_there_yet(tmp_path: Path) -> None:
    models.tiny_gpt2()
    keys, server = Keys(tmp_path), NatsServer(tmp_path)
    agent = AgentProcess(tmp_path, keys, server)
    agent.start()
    try:
        await asyncio.to_thread(agent.logged, "waiting for the broker")
        await asyncio.to_thread(server.start)
        coordinator = await play(keys, server)
        assert (await agent.ready())["ready"] is True
        await coordinator.link.close()
        assert await asyncio.to_thread(agent.signal, signal.SIGINT) == 0
    finally:
        agent.close()
        server.kill()


async def test_a_second_agent_on_the_same_state_is_refused_and_hosts_hold_no_secret(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        second = await asyncio.to_thread(run, "run", site.agent)
        assert second.returncode == 1
        assert "another agent" in second.stderr
        assert site.agent.process is not None
        (host,) = psutil.Process(site.agent.process.pid).children()
        assert "EDIF_TEST_SECRET" in site.agent.environment()
        assert "EDIF_TEST_SECRET" not in host.environ()
        keys = {site.keys.file, site.keys.trust_file, site.agent.state / "journal.db"}
        for process in (host, *host.children()):
            assert not {Path(file.path) for file in process.open_files()} & keys
