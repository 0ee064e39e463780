"""The sandbox profiles where they matter: hosts and runners under each, an agent that may use none, an order that demands one."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.site import SandboxProfile
from edif_mesh.errors import ModelLoadError
from site_agent.hosting.lender import ModelHost
from site_agent.hosting.process import HostSettings
from site_agent.hosting.spec import ModelSpec
from tests import models, traces
from tests.contract.nats_starter import NatsServer
from tests.hosted import code, run, tiny_host
from tests.ordinary_user import cache_for_everybody, run_as_ordinary_user
from tests.played_coordinator import AgentProcess, Keys, play
from tests.runtimes import BUBBLEWRAP

NO_NAMESPACES = subprocess.run(["unshare", "-Upf", "true"], capture_output=True).returncode != 0
needs_namespaces = pytest.mark.skipif(NO_NAMESPACES, reason="this kernel allows no namespaces here")
needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None or NO_NAMESPACES, reason="bubblewrap is not installed here, or may not run"
)
ENCLOSED = [
    pytest.param(SandboxProfile.NAMESPACED, marks=needs_namespaces),
    pytest.param(SandboxProfile.STRICT, marks=needs_bubblewrap),
]

WHAT_IS_THERE = """
import os
outcome = (os.getpid(), [path for path in ("/proc/self", "/sys", "/etc/passwd", SECRET) if os.path.lexists(path)])
"""


@pytest.mark.parametrize("profile", ENCLOSED)
async def test_a_runner_sees_itself_and_its_libraries_and_dies_with_whatever_was_started(
    profile: SandboxProfile, tmp_path: Path
) -> None:
    async with tiny_host(ready=2, sandbox=profile, sandbox_command=BUBBLEWRAP) as host:
        assert host.facts.sandbox == profile
        assert "hidden" in (await run(host, traces.one_read())).values
        host.replenish()
        seen = (await run(host, code(WHAT_IS_THERE.replace("SECRET", repr(str(tmp_path)))))).values["outcome"]
        assert seen == (1, [])
        host.replenish()
        runner = await host.lend()
        assert psutil.Process(runner.pid).ppid() == host.facts.pid
        started = next(p for p in psutil.Process(host.facts.pid).parents() if p.ppid() == os.getpid())
        family = started.children(recursive=True)
        assert {host.facts.pid, runner.pid} <= {process.pid for process in family}
        started.kill()
        await asyncio.wait_for(asyncio.shield(host.closed), 20)
        _, alive = await asyncio.to_thread(psutil.wait_procs, family, 20)
        assert alive == []
        runner.discard()


@needs_namespaces
async def test_a_closed_host_is_gone_with_its_runners() -> None:
    async with tiny_host(ready=2, sandbox=SandboxProfile.NAMESPACED) as host:
        await host.lend()
        family = psutil.Process().children(recursive=True)
        await host.close()
        assert [process for process in family if process.is_running() and process.status() != "zombie"] == []


async def test_a_strict_host_without_a_runtime_is_not_started() -> None:
    with pytest.raises(ModelLoadError, match="no sandbox_command"):
        await ModelHost.start(ModelSpec(models.TINY), HostSettings(sandbox=SandboxProfile.STRICT))


AS_NOBODY = """
import asyncio, os, pathlib, sys
from edif_mesh.domain.site import SandboxProfile
from site_agent.hosting.lender import ModelHost
from site_agent.hosting.process import HostSettings
from site_agent.hosting.spec import ModelSpec
from tests import models, traces
from tests.hosted import run

async def main():
    models.cache = lambda: pathlib.Path(sys.argv[1])
    settings = HostSettings(1, models.cache(), sandbox=SandboxProfile.NAMESPACED)
    host = await ModelHost.start(ModelSpec(models.TINY), settings)
    values = (await run(host, traces.one_read())).values
    print(os.getuid(), host.facts.sandbox, sorted(values))
    await host.close()

asyncio.run(main())
"""


@needs_namespaces
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_has_namespaces_too() -> None:
    models.tiny_gpt2()
    with cache_for_everybody(models.TINY) as cache:
        done = run_as_ordinary_user(["-c", AS_NOBODY, str(cache)])
    assert done.stdout.split()[1:2] == ["namespaced"], done.stderr[-2000:]
    assert not done.stdout.startswith("0")
    assert "hidden" in done.stdout


async def test_a_site_without_a_sandbox_that_is_strong_enough_runs_nothing_and_says_so(tmp_path: Path) -> None:
    models.tiny_gpt2()
    server, keys = NatsServer(tmp_path), Keys(tmp_path)
    agent = AgentProcess(tmp_path, keys, server, least_sandbox="strict")
    server.start()
    try:
        coordinator = await play(keys, server)
        agent.start()
        await agent.ready()
        advert = await coordinator.until(lambda: coordinator.adverts and coordinator.adverts[-1])
        assert advert.sandbox == ""
        assert "strict: no sandbox_command is configured" in advert.note
        order = await coordinator.order()
        await coordinator.place(order)
        report = await coordinator.ended(order)
        assert report.status is AttemptStatus.DECLINED
        assert report.failure is not None
        assert report.failure.code == "no_sandbox"
        seen = len(coordinator.adverts)
        later = await coordinator.until(lambda: len(coordinator.adverts) > seen and coordinator.adverts[-1])
        assert later.note == advert.note  # what was journaled since has not wiped it out
        assert agent.process is not None
        assert psutil.Process(agent.process.pid).children() == []
        assert agent.signal(signal.SIGTERM) == 0
        await coordinator.link.close()
    finally:
        agent.close()
        server.kill()
