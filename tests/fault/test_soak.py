"""Many jobs in a row on one host, every fifth hostile: nothing of them stays, and what the others get does not change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.job import Limits
from edif_mesh.wire.messages import Order, Received
from site_agent.hosting.digest import weights_digest
from site_agent.hosting.lender import ModelHost
from tests import traces
from tests.hosted import LIMITS, code, run, tiny_host
from tests.mesh import hosts_of
from tests.played_coordinator import Site, a_site

SMALL = replace(LIMITS, wall_ms=600, memory_bytes=150 << 20, log_bytes=10_000)

HOSTILE = {
    "changed weights": "import torch\nwith torch.no_grad():\n    for p in model._module.parameters(): p.fill_(7.0)\noutcome = 1",
    "a changed tokenizer": "model.tokenizer.add_tokens(['Hello', 'world']); model.tokenizer.__class__.__call__ = None\noutcome = 1",
    "changed globals": "import torch, json, nnsight\ntorch.nn.Linear.forward = None; torch.set_default_dtype(torch.float64)\n"
    "torch.manual_seed(1); json.dumps = None; nnsight.CONFIG = None\noutcome = 1",
    "a memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "a thread bomb": "import threading, time\nthreading.stack_size(32768)\n"
    "for _ in range(100_000): threading.Thread(target=time.sleep, args=(100,)).start()",
    "an endless loop": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "a print flood": "while True: print('x' * 500)",
    "staying alive": "import threading, time\nthreading.Thread(target=lambda: time.sleep(1000)).start()\noutcome = 1",
    "a closed socket": "import os\nfor fd in range(3, 256):\n    try: os.close(fd)\n    except OSError: pass\noutcome = 1",
    "a segmentation fault": "import ctypes; ctypes.string_at(0)",
}
MAY_SUCCEED = {"changed weights", "a changed tokenizer", "changed globals", "staying alive"}


@dataclass(frozen=True)
class Footprint:
    """What the agent and the host hold, at rest."""

    agent_descriptors: int
    host_descriptors: int
    agent_bytes: int
    host_bytes: int


def footprint(agent: psutil.Process, host: psutil.Process) -> Footprint:
    return Footprint(agent.num_fds(), host.num_fds(), agent.memory_info().rss, host.memory_info().rss)


def assert_flat(early: Footprint, late: Footprint) -> None:
    """Descriptors are exactly as many; memory may have grown by allocators' reserves, not by anything a job."""
    assert (late.agent_descriptors, late.host_descriptors) == (early.agent_descriptors, early.host_descriptors)
    assert late.host_bytes - early.host_bytes < 4 << 20, (early, late)
    assert late.agent_bytes - early.agent_bytes < 16 << 20, (early, late)


async def at_rest(host: psutil.Process, children: Callable[[], bool]) -> None:
    """Wait until the host has only its ready runner again: no zombie, nothing left over."""
    async with asyncio.timeout(20):
        while not _only_one_waits(host) or not children():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def _only_one_waits(host: psutil.Process) -> bool:
    try:
        statuses = [child.status() for child in host.children(recursive=True)]
    except psutil.NoSuchProcess:  # one ended while we looked
        return False
    return len(statuses) == 1 and statuses[0] == psutil.STATUS_SLEEPING


async def soak(host: ModelHost, jobs: int) -> tuple[Footprint, Footprint]:
    """Run `jobs` on `host`, every fifth of them hostile; return what is held after the 20th and after the last."""
    process, agent = psutil.Process(host.facts.pid), psutil.Process()
    payloads = {name: code(source) for name, source in HOSTILE.items()}
    honest, names = traces.one_read(), list(HOSTILE)
    digest = await host.weights_digest()
    reference = bytes((await run(host, honest)).data)
    early: Footprint | None = None
    for number in range(1, jobs + 1):
        if number % 5:
            assert bytes((await run(host, honest)).data) == reference, number
        else:
            name = names[number // 5 % len(names)]
            ended = await run(host, payloads[name], SMALL)
            assert (ended.order[-1] == "RunnerFailed") or name in MAY_SUCCEED, name
        host.replenish()
        if number == 20:
            await at_rest(process, lambda: host.ready == 1)
            early = footprint(agent, process)
    await at_rest(process, lambda: host.ready == 1)
    assert await host.weights_digest() == digest
    assert not host.closed.done()
    assert early is not None
    return early, footprint(agent, process)


async def test_two_hundred_jobs_on_one_host_leave_it_as_it_was() -> None:
    async with tiny_host(ready=1) as host:
        assert_flat(*await soak(host, 200))


async def test_the_digest_is_that_of_the_weights_as_they_lie_in_the_host() -> None:
    """It is that of the same weights read here, another one when a single number differs, and leaves no process behind."""
    async with tiny_host(ready=1) as host:
        first = await host.weights_digest()
        await at_rest(psutil.Process(host.facts.pid), lambda: host.ready == 1)
    model = traces.loaded_tiny_model()
    assert weights_digest(model) == first
    next(model._module.parameters()).data.view(-1)[0] += 1
    assert weights_digest(model) != first


async def test_an_agent_that_ran_hostile_jobs_holds_no_more_than_before(tmp_path: Path) -> None:
    """The same through a whole site: order, grant, runner, result, report."""

    async def runs(site: Site, payload: bytes, wall_ms: int = 600) -> AttemptStatus:
        limits = Limits(wall_ms=wall_ms, memory_bytes=150 << 20, result_bytes=64 << 20, log_bytes=10_000)
        order: Order = await site.coordinator.order(payload, limits=limits)
        assert isinstance(await site.coordinator.place(order), Received)
        report = await site.coordinator.ended(order)
        assert report.receipt is not None
        return report.status

    async with a_site(tmp_path, ready_children=1) as site:
        assert site.agent.process is not None
        agent = psutil.Process(site.agent.process.pid)
        (host,) = hosts_of(agent.pid)
        early = None
        for turn in range(3):
            for source in HOSTILE.values():
                await runs(site, code(source))
            for _ in range(5):
                assert await runs(site, traces.one_read(), 60_000) is AttemptStatus.SUCCEEDED
            await at_rest(host, lambda: site.coordinator.adverts[-1].free_slots == 2)
            if turn == 0:
                early = footprint(agent, host)
        assert early is not None
        late = footprint(agent, host)
        assert abs(late.agent_descriptors - early.agent_descriptors) <= 2, (early, late)
        assert_flat(replace(early, agent_descriptors=0), replace(late, agent_descriptors=0))
