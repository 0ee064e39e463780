"""What dies around an attempt: its runner, its host, the agent, the broker. Nothing is lost, nothing runs twice."""

import asyncio
import signal
import time
from pathlib import Path

import psutil
import pytest

from edif_mesh.domain.attempt import AttemptStatus, Blame
from edif_mesh.wire.messages import Received, Refusal, Report
from tests import traces
from tests.mesh import hosts_of
from tests.played_coordinator import Site, a_site


def processes(site: Site) -> tuple[psutil.Process, list[psutil.Process]]:
    """The host process of the model, and the children that it has forked."""
    assert site.agent.process is not None
    (host,) = hosts_of(site.agent.process.pid)
    return host, host.children()


def busy(children: list[psutil.Process]) -> psutil.Process:
    """Wait until one of the processes is clearly the one that computes, and return it."""
    before = {child.pid: sum(child.cpu_times()[:2]) for child in children}
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in children:
            if sum(child.cpu_times()[:2]) - before[child.pid] > 0.5:
                return child
        time.sleep(0.05)
    raise AssertionError("no child computes")


async def gone(found: list[psutil.Process], timeout_s: float = 5) -> None:
    """Wait until none of the processes lives (a zombie whose parent died with it counts as gone)."""
    _, alive = await asyncio.to_thread(psutil.wait_procs, found, timeout_s)
    assert [item for item in alive if item.is_running() and item.status() != psutil.STATUS_ZOMBIE] == []


async def succeeds(site: Site) -> Report:
    order = await site.coordinator.order(traces.one_read())
    assert isinstance(await site.coordinator.place(order), Received)
    report = await site.coordinator.ended(order, timeout_s=60)
    assert report.status is AttemptStatus.SUCCEEDED, report
    return report


async def test_a_killed_runner_is_the_runners_blame_and_the_next_job_runs(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        order = await site.coordinator.order(traces.endless())
        await site.coordinator.place(order)
        await site.coordinator.running(order)
        _, children = processes(site)
        (await asyncio.to_thread(busy, children)).kill()
        report = await site.coordinator.ended(order)
        assert (report.status, report.blame) == (AttemptStatus.FAILED, Blame.RUNNER)
        assert report.failure is not None
        assert report.failure.code == "runner_crashed"
        await succeeds(site)


async def test_runners_that_die_while_they_wait_cost_no_job(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        await succeeds(site)
        _, children = processes(site)
        for child in children:
            child.kill()
        await gone(children)
        await succeeds(site)


async def test_a_killed_host_is_reported_at_once_and_loaded_again(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        order = await site.coordinator.order(traces.endless())
        await site.coordinator.place(order)
        await site.coordinator.running(order)
        host, children = processes(site)
        host.kill()
        report = await site.coordinator.ended(order, timeout_s=5)
        assert (report.status, report.blame) == (AttemptStatus.FAILED, Blame.SITE)
        assert report.failure is not None
        assert report.failure.code == "host_lost"
        await gone([host, *children])
        # Granted while the model is being loaded again: it waits for it.
        await succeeds(site)


async def test_a_killed_agent_leaves_no_process_and_reports_what_it_held(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        order = await site.coordinator.order(traces.endless())
        envelope = site.coordinator.sign_order(order)
        await site.coordinator.place(order, envelope)
        await site.coordinator.running(order)
        host, children = processes(site)
        boot = site.coordinator.adverts[-1].boot
        site.agent.kill()
        await gone([host, *children])
        site.agent.start()
        report = await site.coordinator.ended(order, timeout_s=15)
        assert (report.status, report.blame) == (AttemptStatus.FAILED, Blame.SITE)
        assert report.failure is not None
        assert report.failure.code == "agent_restarted"
        assert report.boot != boot
        assert report.sequence > max(r.sequence for r in site.coordinator.reports_of(order) if not r.status.terminal)
        await site.agent.ready()
        await site.coordinator.quiet()
        answer = await site.coordinator.place(order, envelope)
        assert isinstance(answer, Refusal)
        assert answer.failure.code == "replay"


async def test_a_finished_result_whose_report_was_never_acknowledged_survives_the_agent(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        site.coordinator.acknowledges = False
        order = await site.coordinator.order(traces.one_read())
        await site.coordinator.place(order)
        first = await site.coordinator.ended(order)
        site.agent.kill()
        site.coordinator.reports.clear()
        site.coordinator.acknowledges = True
        site.agent.start()
        again = await site.coordinator.ended(order)
        assert again.status is AttemptStatus.SUCCEEDED
        assert again.manifest == first.manifest


async def test_sigterm_hands_running_attempts_back_and_leaves_no_process(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        order = await site.coordinator.order(traces.endless())
        await site.coordinator.place(order)
        await site.coordinator.running(order)
        host, children = processes(site)
        status = await asyncio.to_thread(site.agent.signal, signal.SIGTERM)
        assert status == 0, site.agent.log()
        report = await site.coordinator.ended(order)
        assert report.status is AttemptStatus.RELEASED
        await gone([host, *children])


@pytest.mark.parametrize("wiped", [False, True])
async def test_a_broker_killed_while_a_job_runs_costs_nothing(tmp_path: Path, wiped: bool) -> None:
    async with a_site(tmp_path) as site:
        order = await site.coordinator.order(traces.slow(2))
        await site.coordinator.place(order)
        await site.coordinator.running(order)
        site.server.kill()
        if wiped:
            site.server.wipe()
        await asyncio.to_thread(site.server.start)
        report = await site.coordinator.ended(order, timeout_s=60)
        assert report.status is AttemptStatus.SUCCEEDED, report


async def test_a_result_that_finds_no_broker_waits_for_it(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        order = await site.coordinator.order(traces.large(100))
        await site.coordinator.place(order)
        await site.coordinator.running(order)
        site.server.kill()
        host, _ = processes(site)
        # The runner ends although nobody takes its result: the agent keeps it.
        await asyncio.to_thread(site.agent.logged, "attempt computed")
        await asyncio.to_thread(site.server.start)
        report = await site.coordinator.ended(order, timeout_s=60)
        assert report.status is AttemptStatus.SUCCEEDED, report
        assert report.receipt is not None
        assert report.receipt.result_bytes > 100 << 20
        assert host.is_running()
