"""A host whose runners map its weights, on the CPU: all that a GPU's host does but for CUDA itself.

The same jobs as on a host that forks, with the same values; what a job does to the weights is its own affair where they are
private, and is noticed, withheld and mended where they are not.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch

from edif_mesh.domain.ids import BootId, FederationId, SiteId
from edif_mesh.domain.job import Limits
from edif_mesh.domain.site import ModelOffer, ModelState, SandboxProfile
from edif_mesh.errors import ModelLoadError, RunnerError
from site_agent.core.events import Event, HostLost, ModelLoaded
from site_agent.core.state import Model, Now, Policy, State
from site_agent.hosting.lender import ModelHost
from site_agent.hosting.process import HostSettings
from site_agent.hosting.spec import ModelSpec
from site_agent.runner.device_usage import DeviceMeter
from site_agent.runner.events import RunnerFailed
from site_agent.runner.selftest import try_profile
from site_agent.shell.heartbeat import build_advert
from site_agent.shell.models import ModelKeeper
from tests import models, traces
from tests.hosted import a_host, code, played, run
from tests.integration.coordinator_rig import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROFILE = next(p for p in (SandboxProfile.NAMESPACED, SandboxProfile.BASE) if not try_profile(p))
"""The strongest that this machine can do without a runtime around hosts."""
CHANGE_WEIGHTS = """
import torch
with torch.no_grad():
    for parameter in model._module.parameters(): parameter.fill_(7.0)
outcome = next(model._module.parameters()).sum().item()
"""
GRADIENTS = """
import torch
module = model._module
ids = torch.tensor([[1, 2, 3]])
loss = module(ids).logits.float().pow(2).mean()
loss.backward()
outcome = [module.transformer.wte.weight.grad, module.lm_head.weight is module.transformer.wte.weight,
           module.generation_config.pad_token_id, str(model.pipeline.device), module.config._attn_implementation]
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[ModelHost]:
    async with a_host(models.tiny_gpt2(), ready=1, sandbox=PROFILE, sharing="shared_memory") as host:
        yield host


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def forking() -> AsyncIterator[ModelHost]:
    async with a_host(models.tiny_gpt2(), ready=1) as host:
        yield host


async def test_it_gives_the_values_of_a_host_that_forks_to_the_bit(host: ModelHost, forking: ModelHost) -> None:
    for payload in (traces.one_read(), code(GRADIENTS)):
        shared, forked = await run(host, payload), await run(forking, payload)
        assert bytes(shared.data) == bytes(forked.data)
    assert await host.weights_digest() == await forking.weights_digest()
    assert (host.facts.dtype, host.facts.weights_bytes) == (forking.facts.dtype, forking.facts.weights_bytes)
    assert (host.facts.device, host.facts.sharing, forking.facts.sharing) == ("cpu", "shared_memory", "")


async def test_a_job_that_changes_weights_changes_its_own_only(host: ModelHost) -> None:
    before = (await run(host, traces.one_read())).values["hidden"]
    assert (await run(host, code(CHANGE_WEIGHTS))).values["outcome"] == 7.0 * 512 * 64
    assert torch.equal((await run(host, traces.one_read())).values["hidden"], before)
    assert await host.check_weights() == ""


async def test_a_runner_holds_its_socket_and_no_way_back_to_the_weights(host: ModelHost) -> None:
    source = """
import os, ctypes
held = []
for number in range(256):
    try: held.append(oct(os.fstat(number).st_mode & 0o170000))
    except OSError: pass
tried = {}
for name, act in {"map_files": lambda: os.listdir("/proc/self/map_files"), "memfd": lambda: os.memfd_create("x"),
                  "fd": lambda: os.listdir("/proc/self/fd"), "owner": lambda: os.kill(os.getppid(), 0) or os.kill(2, 0)}.items():
    try: act(); tried[name] = "done"
    except OSError as error: tried[name] = type(error).__name__
outcome = [held, tried]
"""
    held, tried = (await run(host, code(source))).values["outcome"]
    assert held == ["0o20000", "0o20000", "0o20000", "0o140000"]
    assert "done" not in tried.values(), tried


async def test_a_host_that_forks_is_shown_no_gpu(forking: ModelHost) -> None:
    """A library that asks whether there is CUDA would start it, and no child could use it, nor compute."""
    source = "import os, torch\noutcome = [os.environ.get('CUDA_VISIBLE_DEVICES'), torch.cuda.is_initialized()]"
    assert (await run(forking, code(source))).values["outcome"] == ["", False]


async def test_a_stopped_job_frees_all_that_it_had_and_the_next_one_runs(host: ModelHost) -> None:
    runner = await host.lend()
    playing = asyncio.create_task(played(runner, code("import torch\nx = torch.ones(20_000_000)\nwhile True: pass")))
    process = psutil.Process(runner.pid)
    await eventually(lambda: process.memory_info().rss > 80_000_000, "the job has its memory")
    runner.kill("cancelled", "The attempt was stopped.")
    failure = (await playing).failure
    assert failure.code == "cancelled"
    await eventually(lambda: not process.is_running() or process.status() == psutil.STATUS_DEAD, "the process is gone")
    assert (await run(host, traces.one_read())).values


async def test_limits_hold_and_a_failed_job_is_checked_too(host: ModelHost) -> None:
    greedy = await run(host, code("x = []\nwhile True: x.append(bytearray(1 << 20))"))
    assert greedy.failure.code == "out_of_memory"
    assert (await run(host, traces.failing())).failure.code == "user_error"
    assert not host.closed.done()


async def test_device_memory_that_runs_out_is_one_sentence(host: ModelHost) -> None:
    """As torch says it on a GPU; there the real one is tested by `tests/gpu`."""
    said = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 3.00 GiB is free."
    failure = (await run(host, code(f"import torch\nraise torch.OutOfMemoryError({said!r})"))).failure
    assert failure.code == "out_of_memory"
    assert "limit of 0.54 GB" in failure.text
    assert "Tried to allocate 20.00 GiB." in failure.text
    assert "Traceback" not in failure.text


async def test_a_job_that_takes_more_of_a_device_than_its_limit_is_stopped(host: ModelHost) -> None:
    """The driver's count is played; that it is what the job has on a GPU is for `tests/gpu`."""
    counts = iter([400 << 20])
    runner = await host.lend()
    runner._device_meter = DeviceMeter(runner.pid, lambda pid: next(counts, (400 << 20) + (3 << 30)))
    failure = (await played(runner, traces.endless())).failure
    assert failure.code == "out_of_memory"
    assert "3.22 GB of memory on its GPU" in failure.text
    assert failure.receipt.device_memory_bytes == 3 << 30


async def test_a_write_that_the_gpu_refuses_says_what_to_do_instead(host: ModelHost) -> None:
    said = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
    failure = (await run(host, code(f"raise RuntimeError({said!r})"))).failure
    assert failure.code == "user_error"
    assert "mapped read-only on this device" in failure.text
    assert "functional_call" in failure.text
    assert "read-only" not in (await run(host, code("raise RuntimeError('another')"))).failure.text


# ---------------------------------------------------------------------------------------- memory that a job can change


async def test_changed_weights_raise_an_alarm_withhold_the_result_and_are_loaded_anew(tmp_path: Path) -> None:
    """Where runners can write to the weights, as by CUDA IPC: the keeper of a real agent, its hosts, and a hostile job."""
    told: list[Event] = []

    async def tell(event: Event) -> None:
        told.append(event)

    spec = ModelSpec(models.tiny_gpt2(), sharing="shared_memory_writable")
    offer = ModelOffer(spec.repo_id, "", spec.task, "auto", ModelState.LOADING, 0, 0)
    keeper = ModelKeeper([spec], HostSettings(ready_children=1, hf_cache=models.cache()), tmp_path, tell)
    try:
        keeper.load(spec.repo_id, offer)
        first = (await eventually(lambda: [e for e in told if isinstance(e, ModelLoaded)], "it is loaded", 60))[0]
        assert (first.offer.detail, first.offer.device) == ("", "cpu")
        honest = (await played(await keeper.lend(spec.repo_id), traces.one_read())).values["hidden"]
        beside = await keeper.lend(spec.repo_id)
        waiting = asyncio.create_task(played(beside, traces.endless()))
        hostile = await played(await keeper.lend(spec.repo_id), code(CHANGE_WEIGHTS))
        assert isinstance(hostile.end, RunnerFailed)
        assert hostile.end.code == "weights_changed"
        assert "transformer.wte.weight" in hostile.end.text
        assert "withheld" in hostile.end.text
        assert hostile.end.receipt.result_bytes == 0
        assert (await waiting).failure.code == "weights_changed"  # it has run on them
        lost = (await eventually(lambda: [e for e in told if isinstance(e, HostLost)], "the host is given up"))[0]
        assert "ALARM" in lost.text
        with pytest.raises(RunnerError):
            await keeper.lend(spec.repo_id)
        keeper.load(spec.repo_id, offer)  # what the core does next
        again = (await eventually(lambda: [e for e in told if isinstance(e, ModelLoaded)][1:], "loaded anew", 60))[0]
        assert again.offer.detail.startswith("ALARM: the weights of")
        policy = Policy(FederationId("f"), SiteId("s"), "DE", 1, 1, Limits(), 5_000)
        state = State(policy, BootId("b"), models={spec.repo_id: Model(again.offer)})
        assert build_advert(state, Now(1, 1)).note == again.offer.detail  # where an operator looks
        mended = (await played(await keeper.lend(spec.repo_id), traces.one_read())).values["hidden"]
        assert torch.equal(mended, honest)
    finally:
        await keeper.close()


async def test_without_its_owner_a_host_ends_and_leaves_no_process(host: ModelHost) -> None:
    """Last: it ends the host. Nobody could check the weights any more."""
    server = psutil.Process(host.facts.pid)
    runner = await host.lend()
    family = server.children(recursive=True)
    owner = next(
        child
        for child in family
        if child.pid != runner.pid and child.create_time() == min(c.create_time() for c in family)
    )
    os.kill(owner.pid, signal.SIGKILL)
    assert "died" in await asyncio.wait_for(asyncio.shield(host.closed), 15)
    await eventually(
        lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), "all are gone"
    )


@pytest.mark.slow
async def test_a_model_that_cannot_be_loaded_is_refused_with_the_owners_sentence() -> None:
    with pytest.raises(ModelLoadError, match=r"The model edif-test/nowhere could not be loaded: \w+"):
        async with a_host("edif-test/nowhere", sharing="shared_memory"):
            pass


@pytest.mark.slow
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has the driver")
async def test_a_gpu_without_a_driver_is_said_in_one_sentence() -> None:
    with pytest.raises(ModelLoadError, match="could not be loaded: There is no NVIDIA driver on this machine"):
        async with a_host(models.tiny_gpt2(), sharing="cuda"):
            pass
