"""A runner that nobody wants yet warms up; one that is wanted at once runs its job cold: the same values."""

from pathlib import Path

import torch

from site_agent.runner.supervisor import Runner
from tests import traces
from tests.hosted import code, played, run, tiny_host
from tests.integration.coordinator_rig import eventually


def faults(runner: Runner) -> int:
    """Page faults of the runner's process so far: what a warm-up takes out of the job's way."""
    return int(Path(f"/proc/{runner.pid}/stat").read_text().rpartition(")")[2].split()[7])


async def test_warm_and_cold_runners_give_the_same_values() -> None:
    async with tiny_host(ready=1) as host:
        cold = await host.lend()
        values = [(await played(cold, traces.one_read())).values["hidden"]]
        warm = await host.lend()
        warm.warm_up()
        values.append((await played(warm, traces.one_read())).values["hidden"])
        assert torch.equal(*values)


async def test_a_runner_that_waits_warms_up() -> None:
    async with tiny_host(ready=1) as host:
        runner = await host.lend()
        at_first = faults(runner)
        await eventually(lambda: faults(runner) > at_first + 50, "the runner warmed up")
        assert (await played(runner, traces.one_read())).values


async def test_the_collector_is_on_again_when_a_job_runs() -> None:
    source = "import gc\noutcome = [gc.isenabled(), *gc.get_threshold()]"
    async with tiny_host(ready=1) as host:
        enabled, young, *_ = (await run(host, code(source))).values["outcome"]
        assert enabled
        assert 0 < young < 10_000
