"""Hosts on a real GPU: loading, runners that map shared weights, the weights check, limits, two models on a device, cancel.

All of it skips without a device. What does not need one is in `tests/integration/test_shared_host.py`.
"""

from __future__ import annotations

import asyncio

import pytest
import torch

from edif_mesh.errors import ModelLoadError
from site_agent import hardware
from site_agent.hosting.stores import CUDA_IPC, CUDA_VMM
from tests import models, traces
from tests.gpu.device import GPU_LIMITS, gpu_host, needs_gpu, used_bytes
from tests.hosted import code, played, run, tiny_host
from tests.integration.coordinator_rig import eventually

pytestmark = [*needs_gpu, pytest.mark.timeout(300)]

KINDS = (CUDA_VMM, CUDA_IPC)
MB = 1 << 20
WRITE = """
import torch
with torch.no_grad():
    for parameter in model._module.parameters(): parameter.fill_(7.0)
torch.cuda.synchronize()
outcome = 1
"""
GRADIENTS = """
import torch
module = model._module
embedded = module.transformer.wte(torch.tensor([[1, 2, 3]], device="cuda")).detach().requires_grad_(True)
module(inputs_embeds=embedded).logits.pow(2).mean().backward()
outcome = embedded.grad.cpu()
"""


@pytest.mark.parametrize("kind", KINDS)
async def test_a_model_loads_and_runners_that_map_it_give_the_values_of_the_cpu(kind: str) -> None:
    async with gpu_host(kind) as host, tiny_host() as on_cpu:
        assert (host.facts.device, host.facts.sharing) == ("cuda:0", kind)
        expected = (await run(on_cpu, traces.one_read())).values["hidden"]
        for _ in range(3):
            ended = await run(host, traces.one_read(), GPU_LIMITS)
            assert torch.allclose(ended.values["hidden"].float().cpu(), expected.float(), atol=1e-3)
            host.replenish()
        assert await host.weights_digest() == await on_cpu.weights_digest()


async def test_virtual_memory_is_what_a_site_gets_where_the_driver_has_it() -> None:
    async with gpu_host("cuda") as host:
        assert host.facts.sharing == CUDA_VMM


@pytest.mark.parametrize("kind", KINDS)
async def test_runners_share_the_weights_and_do_not_copy_them(kind: str) -> None:
    """Two more runners of a model of 500 MB cost two contexts, which are the same for a small model."""
    costs = []
    for repo_id in (models.tiny_gpt2(), models.gpt2_shape()):
        async with gpu_host(kind, repo_id, ready=1) as host:
            one = await host.lend()
            before = used_bytes()
            others = [await host.lend(), await host.lend()]
            costs.append(used_bytes() - before)
            for runner in (one, *others):
                runner.discard()
    assert abs(costs[1] - costs[0]) < 200 * MB, costs


async def test_where_weights_are_mapped_read_only_a_write_ends_the_job_with_the_way_out() -> None:
    async with gpu_host(CUDA_VMM) as host:
        before = (await run(host, traces.one_read(), GPU_LIMITS)).values["hidden"]
        failure = (await run(host, code(WRITE), GPU_LIMITS)).failure
        assert failure.code == "user_error"
        assert "mapped read-only" in failure.text
        assert await host.check_weights() == ""
        assert torch.equal((await run(host, traces.one_read(), GPU_LIMITS)).values["hidden"], before)


async def test_where_they_can_be_written_the_weights_check_withholds_the_result_and_ends_the_host() -> None:
    async with gpu_host(CUDA_IPC) as host:
        assert await host.check_weights() == ""
        failure = (await run(host, code(WRITE), GPU_LIMITS)).failure
        assert failure.code == "weights_changed"
        assert "transformer.wte.weight" in failure.text
        assert host.alarm
        assert host.closed.done()


async def test_gradients_and_changed_activations_work_on_shared_weights() -> None:
    async with gpu_host() as host:
        gradient = (await run(host, code(GRADIENTS), GPU_LIMITS)).values["outcome"]
        assert gradient.abs().sum() > 0


async def test_a_job_stays_within_its_memory_and_is_told_when_it_does_not() -> None:
    async with gpu_host() as host:
        failure = (
            await run(
                host, code("import torch\nx = torch.empty(3 << 30, dtype=torch.uint8, device='cuda')"), GPU_LIMITS
            )
        ).failure
        assert failure.code == "out_of_memory"
        assert "limit of 2.15 GB" in failure.text
        assert "Tried to allocate 3.00 GiB" in failure.text
        assert (await run(host, traces.one_read(), GPU_LIMITS)).values


async def test_the_receipt_says_what_a_job_had_on_the_device() -> None:
    """By the driver's count, which a container with process ids of its own does not get."""
    async with gpu_host() as host:
        runner = await host.lend()
        if hardware.GpuProcesses()(runner.pid) in (None, 0):
            pytest.skip("the driver counts no memory for this process")
        ended = await played(
            runner,
            code(
                "import torch, time\nx = torch.ones(256 << 20, dtype=torch.uint8, device='cuda')\ntime.sleep(1)\noutcome = 1"
            ),
            GPU_LIMITS,
        )
        assert ended.end is not None
        assert 256 * MB <= ended.end.receipt.device_memory_bytes < 1024 * MB
        assert ended.end.receipt.device == "cuda:0"


async def test_two_models_on_one_device_do_not_see_each_other() -> None:
    async with gpu_host(repo_id=models.tiny_gpt2()) as small, gpu_host(repo_id=models.deep_gpt2()) as deep:
        assert small.facts.device == deep.facts.device == "cuda:0"
        before = (await run(small, traces.one_read(), GPU_LIMITS)).values["hidden"]
        assert (await run(deep, code("outcome = len(model._module.transformer.h)"), GPU_LIMITS)).values["outcome"] == 48
        await deep.close()
        assert torch.equal((await run(small, traces.one_read(), GPU_LIMITS)).values["hidden"], before)


async def test_a_model_that_does_not_fit_is_a_sentence_and_leaves_the_device_as_it_was() -> None:
    before = used_bytes()
    free = hardware.gpus()[0].free_bytes
    hog = torch.empty(max(0, free - 300 * MB), dtype=torch.uint8, device="cuda:0")
    try:
        with pytest.raises(ModelLoadError, match="memory"):
            async with gpu_host(repo_id=models.gpt2_shape()):
                pass
    finally:
        del hog
        torch.cuda.empty_cache()
    await eventually(lambda: used_bytes() < before + 1024 * MB, "nothing of the failed load is left")


async def test_a_cancelled_job_frees_its_memory() -> None:
    async with gpu_host() as host:
        runner = await host.lend()
        before = used_bytes()
        playing = asyncio.create_task(
            played(
                runner,
                code("import torch\nx = torch.ones(1 << 30, dtype=torch.uint8, device='cuda')\nwhile True: x.add_(1)"),
                GPU_LIMITS,
            )
        )
        await eventually(lambda: used_bytes() > before + 900 * MB, "the job has its memory", 30)
        runner.kill("cancelled", "The attempt was stopped.")
        await playing
        await eventually(lambda: used_bytes() < before + 200 * MB, "its memory is free")
        assert (await run(host, traces.one_read(), GPU_LIMITS)).values


async def test_runners_under_the_filter_of_system_calls_still_compute_generate_and_copy() -> None:
    source = """
import torch
x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
y = (x @ x).float().cpu()
pinned = torch.ones(1 << 20).pin_memory()
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    z = pinned.to("cuda", non_blocking=True)
torch.cuda.synchronize()
ids = model._module.generate(torch.tensor([[1, 2, 3]], device="cuda"), max_new_tokens=5, do_sample=False)
outcome = [y.isfinite().all().item(), z.sum().item(), list(ids.shape)]
"""
    async with gpu_host() as host:
        assert (await run(host, code(source), GPU_LIMITS)).values["outcome"] == [True, float(1 << 20), [1, 8]]


@pytest.mark.skipif(hardware.cuda_devices() < 2, reason="needs two GPUs")
async def test_a_model_over_two_devices_runs_as_on_one() -> None:
    half = {
        "transformer.wte": 0,
        "transformer.wpe": 0,
        "transformer.drop": 0,
        "transformer.h.0": 0,
        "transformer.h.1": 1,
        "transformer.ln_f": 1,
        "lm_head": 1,
    }
    async with gpu_host() as one, gpu_host(device_map=half) as two:
        assert two.facts.device == "cuda:0,cuda:1"
        values = [(await run(host, traces.one_read(), GPU_LIMITS)).values["hidden"].cpu() for host in (one, two)]
        assert torch.allclose(*values, atol=1e-4)
