"""What a job may use, and what is left of one that is stopped: each limit with its code and its sentence, each phase of a cancel."""

from __future__ import annotations

import asyncio
import errno
import json
import mmap
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.ids import AttemptNumber
from edif_mesh.domain.job import Limits
from edif_mesh.domain.site import ModelState, SandboxProfile
from edif_mesh.errors import NoRunnerError
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import open_envelope
from edif_mesh.wire.messages import Manifest, Order, Received, Report
from site_agent.hosting import host as host_process
from site_agent.hosting.lender import ModelHost
from site_agent.runner.namespaces import Enclosure
from site_agent.runner.selftest import try_profile
from site_agent.runner.supervisor import Runner
from site_agent.runner.usage import Meter, read_usage
from site_agent.shell.spool import Spool
from tests import models, traces
from tests.hosted import LIMITS, a_host, code, played, run, tiny_host
from tests.mesh import hosts_of
from tests.played_coordinator import Site, a_site, now_ms

pytestmark = pytest.mark.asyncio(loop_scope="module")

MB = 10**6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[ModelHost]:
    async with tiny_host(ready=1) as host:
        yield host


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    limits = "[limits]\nwall_ms = 60000\ncpu_ms = 2000\nmemory_bytes = 1073741824\nresult_bytes = 1073741824\n"
    async with a_site(tmp_path_factory.mktemp("site"), limits, ready_children=1) as site:
        yield site


# ------------------------------------------------------------------------------------------------------------- limits


@dataclass(frozen=True)
class Over:
    """Code that goes over one limit, and what must be said of it."""

    source: str
    limits: dict[str, int]
    code: str
    says: tuple[str, ...]


OVER = {
    "run time": Over("while True: pass", {"wall_ms": 700}, "wall_time", ("ran for", "limit is 0.7 s", "wall_ms")),
    "processor time in Python": Over("while True: pass", {"cpu_ms": 600}, "cpu_time", ("limit is 0.6 s", "cpu_ms")),
    "processor time of threads": Over(
        "import threading, hashlib\n"
        "def burn():\n    while True: hashlib.sha256(bytes(1 << 20)).digest()\n"
        "for _ in range(3): threading.Thread(target=burn).start()\nburn()",
        {"cpu_ms": 900},
        "cpu_time",
        ("limit is 0.9 s", "all its threads", "cpu_ms"),
    ),
    "one large piece of memory": Over(
        "import torch; x = torch.ones(50 << 30)",
        {},
        "out_of_memory",
        ("limit of 0.54 GB", "refused has 214.75 GB", "at its highest", "memory_bytes"),
    ),
    "anonymous memory mapped by hand": Over(
        "import mmap\nkept = []\nwhile True:\n    kept.append(mmap.mmap(-1, 1 << 24)); kept[-1].write(b'x' * (1 << 24))",
        {"memory_bytes": 200 * MB},
        "out_of_memory",
        ("limit is 0.20 GB", "memory_bytes"),
    ),
    "memory of many threads": Over(
        "import threading\nkept = []\n"
        "def fill():\n    while True: kept.append(bytearray(1 << 20))\n"
        "for _ in range(4): threading.Thread(target=fill).start()\nfill()",
        {"memory_bytes": 200 * MB},
        "out_of_memory",
        ("memory_bytes",),
    ),
    "weights unmapped and their addresses filled": Over(
        "import gc, torch\nmodel._module = None; model._model = None\ngc.collect()\nkept = []\nwhile True: kept.append(bytearray(1 << 18))",
        {"memory_bytes": 150 * MB},
        "out_of_memory",
        ("memory_bytes",),
    ),
    "result": Over(
        "import torch; outcome = torch.zeros(20 << 20)",
        {"result_bytes": 60 * MB},
        "result_too_large",
        ("take 83.9 MB", "may return 60.0 MB", "result_bytes"),
    ),
}


@pytest.mark.parametrize("name", OVER)
async def test_a_job_over_a_limit_fails_with_the_limit_what_was_used_and_what_to_raise(
    host: ModelHost, name: str
) -> None:
    over = OVER[name]
    failure = (await run(host, code(over.source), replace(LIMITS, **over.limits))).failure
    assert failure.code == over.code, failure
    for words in over.says:
        assert words in failure.text, failure.text


@pytest.mark.parametrize("profile", [SandboxProfile.BASE, SandboxProfile.NAMESPACED])
async def test_weights_that_a_job_changes_count_as_its_memory(profile: SandboxProfile) -> None:
    """500 MB of weights, written to in place: no address is new, so only the exact count sees the copies."""
    change = """
import torch
with torch.no_grad():
    for parameter in model._module.parameters(): parameter.add_(1)
outcome = 1
"""
    if problem := try_profile(profile):
        pytest.skip(problem)
    async with a_host(models.gpt2_shape(), sandbox=profile) as host:
        failure = (await run(host, code(change + "while True: pass"), replace(LIMITS, memory_bytes=200 * MB))).failure
        assert failure.code == "out_of_memory"
        assert "weights that it changes count" in failure.text
        assert failure.receipt.peak_memory_bytes > 200 * MB
        allowed = await run(host, code(change), replace(LIMITS, memory_bytes=2_000 * MB))
        assert allowed.values["outcome"] == 1
        assert allowed.end is not None
        assert 450 * MB < allowed.end.receipt.peak_memory_bytes < 900 * MB


async def test_pages_copied_from_the_host_are_seen_where_the_cheap_count_is_blind() -> None:
    """A child writes to 200 MB that it shares with its parent: no address is new, and all of it is counted."""
    size = 200 << 20
    shared = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    shared.write(bytes([7]) * size)
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            meter = os.open("/proc/self/smaps_rollup", os.O_RDONLY)
            socket.send_fds(theirs, [b"m"], [meter])
            theirs.recv(1)
            for place in range(0, size, 4096):
                shared[place] = 1
            theirs.send(b"w")
            theirs.recv(1)
        finally:
            os._exit(0)
    _, (descriptor, *_), _, _ = socket.recv_fds(ours, 1, 1)
    meter = Meter(pid)
    meter.adopt(descriptor)
    meter.start()
    before = read_usage(pid)
    ours.send(b"g")
    ours.recv(1)
    after = read_usage(pid)
    assert before is not None
    assert after is not None
    assert abs(after.anonymous_bytes - before.anonymous_bytes) < 10 * MB
    assert meter.read()
    assert meter.should_look(100 * MB)
    meter.look()
    assert size <= meter.memory_bytes < size + 20 * MB
    ours.send(b"e")
    await asyncio.to_thread(os.waitpid, pid, 0)
    meter.close()
    ours.close()
    theirs.close()


async def test_another_processs_count_is_not_taken_for_the_runners() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    meter = Meter(os.getppid())
    meter.adopt(os.open("/proc/self/smaps_rollup", os.O_RDONLY))
    meter.start()
    assert meter.read()
    assert not meter.should_look(0)
    assert len(os.listdir("/proc/self/fd")) == descriptors


# ------------------------------------------------------------------------------------------------------------ receipts


async def test_a_receipt_is_the_kernels_word_and_not_the_runners(host: ModelHost) -> None:
    source = """
import os, resource, sys, threading, time
nothing = lambda *a: 0
for module, names in ((time, ("time", "monotonic", "process_time", "perf_counter")), (os, ("times", "getpid")),
                      (resource, ("getrusage", "setrlimit"))):
    for name in names: setattr(module, name, nothing)
block = bytearray(120_000_000); block[::4096] = b"x" * len(block[::4096])
for _ in range(60_000_000): pass
print("x" * 999)
del block
outcome = 1
"""
    ended = await run(host, code(source))
    assert ended.values["outcome"] == 1
    assert ended.end is not None
    receipt = ended.end.receipt
    assert receipt.wall_ms >= receipt.cpu_ms * 0.5 > 100
    assert 115 * MB < receipt.peak_memory_bytes < 250 * MB
    assert receipt.log_bytes == 1000
    assert receipt.result_bytes == len(ended.data)
    assert receipt.device == "cpu"


@pytest.mark.parametrize("source", ["1 / 0", "import os; os.abort()", "while True: pass"])
async def test_a_job_that_ends_without_a_result_has_a_receipt_too(host: ModelHost, source: str) -> None:
    burn = "import time\nbegan = time.process_time()\nwhile time.process_time() - began < 0.2: pass\nprint('so far')\n"
    failure = (await run(host, code(burn + source), replace(LIMITS, wall_ms=1_500))).failure
    assert failure.receipt.cpu_ms >= 200
    assert failure.receipt.log_bytes == 7
    assert failure.receipt.result_bytes == 0


# -------------------------------------------------------------------------------------------------- at the whole site


ALLOWED = Limits(wall_ms=60_000, memory_bytes=1 << 30, result_bytes=1 << 30, log_bytes=1 << 20, cpu_ms=2_000)


async def ended(site: Site, order: Order) -> Report:
    assert isinstance(await site.coordinator.place(order), Received)
    return await site.coordinator.ended(order)


async def test_the_sites_own_limits_hold_where_the_order_names_none(site: Site) -> None:
    order = await site.coordinator.order(traces.endless())
    report = await ended(site, order)
    assert report.failure is not None
    assert report.failure.code == "cpu_time"
    assert "limit is 2.0 s" in report.failure.text
    assert report.receipt is not None
    assert report.receipt.cpu_ms >= 2_000


@pytest.mark.parametrize(
    "asked", [{"wall_ms": 60_001}, {"memory_bytes": 2 << 30}, {"cpu_ms": 2_001}, {"log_bytes": 2 << 20}]
)
async def test_an_order_that_asks_for_more_than_the_site_allows_is_declined(site: Site, asked: dict[str, int]) -> None:
    report = await ended(site, await site.coordinator.order(traces.one_read(), limits=replace(ALLOWED, **asked)))
    assert report.status is AttemptStatus.DECLINED
    assert report.failure is not None
    assert report.failure.code == "over_site_limits"
    assert next(iter(asked)) in report.failure.text
    assert report.receipt is None


async def test_the_receipt_in_the_manifest_is_the_one_in_the_report(site: Site) -> None:
    report = await ended(site, await site.coordinator.order(traces.printing()))
    assert report.status is AttemptStatus.SUCCEEDED
    assert report.manifest is not None
    manifest = open_envelope(report.manifest, Manifest, site.keys.trust, now_ms()).message
    assert manifest.receipt == report.receipt
    assert manifest.receipt.sandbox
    assert manifest.receipt.log_bytes == len("one\ntwo\nthree\n")
    assert manifest.receipt.wall_ms > 0


# -------------------------------------------------------------------------------------------------------------- cancel

PHASES = {
    "computing in Python": "print('here')\nwhile True: pass",
    "a product of large matrices": "import torch\nx = torch.ones(3000, 3000)\nprint('here')\nwhile True: x @ x",
    "a parallel region": "import torch\ntorch.set_num_threads(4)\nx = torch.ones(3000, 3000)\nprint('here')\nwhile True: torch.exp(x).sum()",
    "asleep in the kernel": "import time\nprint('here')\ntime.sleep(1000)",
    "printing": "print('here')\nwhile True: print('x' * 50, flush=True)",
    "filling memory": "print('here')\nx = []\nwhile True: x.append(bytearray(1 << 16)); len(x) < 5000 or x.clear()",
    "many threads": "import threading, time\nfor _ in range(50): threading.Thread(target=time.sleep, args=(100,)).start()\nprint('here')\ntime.sleep(100)",
    "a signal ignored": "import signal, time\nfor n in (1, 2, 3, 15): signal.signal(n, signal.SIG_IGN)\nprint('here')\ntime.sleep(100)",
}


def processes(site: Site) -> tuple[psutil.Process, psutil.Process]:
    """The agent and the host of its one model."""
    assert site.agent.process is not None
    agent = psutil.Process(site.agent.process.pid)
    (host,) = hosts_of(agent.pid)
    return agent, host


async def printed(site: Site, order: Order) -> None:
    """Wait until the job has printed its first line."""
    async with asyncio.timeout(20):
        subject = subjects.log_lines(order.job, AttemptNumber(1))
        async for _ in site.coordinator.link.streams.read(subjects.LOGS_STREAM, subject):
            return


async def cancelled(site: Site, order: Order) -> Report:
    assert isinstance(await site.coordinator.stop(order), Received)
    report = await site.coordinator.ended(order)
    assert (report.status, report.detail) == (AttemptStatus.CANCELLED, "cancelled")
    return report


async def idle(site: Site) -> set[int]:
    """Wait until one runner is ready and nothing runs; return the host's children."""
    _, host = processes(site)
    async with asyncio.timeout(20):
        while len(children := host.children()) != 1 or site.coordinator.adverts[-1].free_slots != 2:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return {child.pid for child in children}


@pytest.mark.parametrize("phase", PHASES)
async def test_when_the_last_report_of_a_cancelled_job_arrives_its_runner_is_gone(site: Site, phase: str) -> None:
    (runner,) = await idle(site)
    order = await site.coordinator.order(code(PHASES[phase]), limits=ALLOWED)
    await site.coordinator.place(order)
    await printed(site, order)
    report = await cancelled(site, order)
    assert not psutil.pid_exists(runner), "the runner is still there, or a zombie"
    assert report.receipt is not None
    assert report.receipt.wall_ms > 0
    assert report.receipt.log_bytes >= len("here\n")
    assert report.receipt.result_bytes == 0
    await idle(site)


async def test_a_cancel_while_the_payload_is_on_its_way_ends_the_runner_that_was_lent(site: Site) -> None:
    (runner,) = await idle(site)
    order = await site.coordinator.order(b"")  # no payload is stored: the site waits for it
    order = replace(order, payload=replace(order.payload, size_bytes=10))
    await site.coordinator.place(order)
    await site.coordinator.until(lambda: site.coordinator.adverts[-1].free_slots == 1)
    report = await cancelled(site, order)
    assert report.receipt is None
    assert not psutil.pid_exists(runner)
    await idle(site)


async def test_a_cancel_while_the_job_waits_for_a_runner_leaves_nothing(site: Site) -> None:
    await idle(site)
    _, host = processes(site)
    host.send_signal(signal.SIGSTOP)  # it forks no more: the one ready runner goes to the first job
    try:
        first, second = [await site.coordinator.order(code(PHASES["asleep in the kernel"])) for _ in range(2)]
        await site.coordinator.place(first)
        await printed(site, first)
        await site.coordinator.place(second)
        await site.coordinator.until(lambda: site.coordinator.adverts[-1].free_slots == 0)
        assert (await cancelled(site, second)).receipt is None
    finally:
        host.send_signal(signal.SIGCONT)
    await cancelled(site, first)
    assert (await ended(site, await site.coordinator.order(traces.one_read()))).status is AttemptStatus.SUCCEEDED


async def test_a_cancel_while_the_result_is_stored_ends_the_storing(site: Site) -> None:
    agent, _ = processes(site)
    order = await site.coordinator.order(traces.large(400), limits=ALLOWED)
    await site.coordinator.place(order)
    chunks = subjects.result_chunks(order.job, AttemptNumber(1))
    async with asyncio.timeout(20):
        while not await site.coordinator.link.streams.subjects(subjects.RESULTS_STREAM, chunks):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    report = await cancelled(site, order)
    assert report.receipt is not None
    assert [file.path for file in agent.open_files() if "/spool/" in file.path] == []
    await site.coordinator.quiet()  # what was on the wire has arrived
    before = await site.coordinator.link.streams.subjects(subjects.RESULTS_STREAM, chunks)
    await site.coordinator.quiet()
    assert await site.coordinator.link.streams.subjects(subjects.RESULTS_STREAM, chunks) == before
    assert len(before) < 400, "all of it was stored"


async def test_a_cancel_while_the_model_loads_ends_the_attempt_at_once_and_later_jobs_run(site: Site) -> None:
    """The load itself goes on; a job that waits for it pays it, and its receipt says so."""
    _, host = processes(site)
    host.kill()
    await site.coordinator.until(lambda: site.coordinator.adverts[-1].models[0].state is not ModelState.LOADED)
    first, second = [await site.coordinator.order(traces.one_read()) for _ in range(2)]
    await site.coordinator.place(first)
    await site.coordinator.place(second)
    assert (await cancelled(site, first)).receipt is None
    report = await site.coordinator.ended(second, timeout_s=60)
    assert report.status is AttemptStatus.SUCCEEDED
    assert report.receipt is not None
    assert report.receipt.load_ms > 0


async def test_a_spool_that_is_closed_under_a_writer_gives_its_file_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path, memory_bytes=0)
    writing = asyncio.create_task(spool.put(bytearray(64 << 20)))
    await asyncio.sleep(0)
    writing.cancel()
    spool.close()
    await spool.put(b"late")
    async with asyncio.timeout(10):
        while any(str(tmp_path) in file.path for file in psutil.Process().open_files()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- a machine that has no more


async def test_a_host_without_free_descriptors_says_so_and_goes_on_when_it_has_some(
    host: ModelHost,
) -> None:
    pid = host.facts.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = next(number for number in range(10_000) if number not in used)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, limits[1]))
    with pytest.raises(NoRunnerError, match=r"gets no runner at present: its host has no free descriptor\."):
        while True:
            (await host.lend()).discard()
    waiting = asyncio.create_task(host.lend())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    ended = await played(await waiting, traces.one_read())
    assert ended.values["hidden"].shape[-1] == 64
    assert not host.closed.done()


async def test_an_agent_without_free_descriptors_says_so_and_goes_on_when_it_has_some(
    host: ModelHost,
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(NoRunnerError, match="the agent cannot open a socket: Too many open files"):
            while True:
                (await host.lend()).discard()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (await run(host, traces.one_read())).values["hidden"].shape[-1] == 64


async def test_a_fork_that_the_kernel_refuses_is_answered_and_costs_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    agent, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(os, "fork", refused)
    host_process._fork(control, Enclosure(SandboxProfile.BASE), theirs.detach(), lambda *_: None)
    assert json.loads(agent.recv(1000)) == {"refused": "the kernel refused a process: Resource temporarily unavailable"}
    assert ours.recv(1) == b""
    for end in (agent, control, ours):
        end.close()


async def test_runners_that_die_at_once_are_made_again_ever_more_rarely(
    host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, deaths = Runner.ready, [3]

    async def dies(runner: Runner) -> None:
        if deaths[0] > 0:
            deaths[0] -= 1
            os.kill(runner.pid, signal.SIGKILL)
        await honest(runner)

    monkeypatch.setattr(Runner, "ready", dies)
    while deaths[0] > 0:
        (await host.lend()).discard()
    assert (await run(host, traces.one_read())).values["hidden"].shape[-1] == 64
