"""What a host on a GPU costs: load, a ready runner, a job, the weights check, memory; by each way of sharing weights.

Run from the repository: `python -m benchmarks.gpu.hosts [--model HUB_ID] [--dtype bfloat16] [--runs 30]`. The model has to be
in the Hugging Face cache; by default a random GPT-2 of 124 M parameters is made. Prints a table; writes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path

from edif_mesh.domain.job import Limits
from edif_mesh.models import hub_cache
from site_agent import hardware
from site_agent.hosting.lender import ModelHost
from site_agent.hosting.process import HostSettings
from site_agent.hosting.spec import ModelSpec
from site_agent.hosting.stores import CUDA_IPC, CUDA_VMM
from tests import models, traces
from tests.hosted import played

LIMITS = Limits(wall_ms=600_000, memory_bytes=8 << 30, result_bytes=1 << 30, log_bytes=100_000)


def main() -> None:
    """Measure each way of sharing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="a hub id in the Hugging Face cache")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device-map", default=None, help="auto, to spread the model over all GPUs")
    parser.add_argument("--runs", type=int, default=30)
    given = parser.parse_args()
    if not hardware.cuda_devices():
        sys.exit("No GPU was found (or torch was installed without CUDA): nothing was measured.")
    for device in hardware.gpus():
        print(f"{device.name}, {device.memory_bytes / 1e9:.0f} GB")
    repo_id, cache = (given.model, hub_cache()) if given.model else (models.gpt2_shape(), models.cache())
    rows = []
    for sharing in (CUDA_VMM, CUDA_IPC):
        spec = ModelSpec(repo_id, dtype=given.dtype, device="cuda:0", device_map=given.device_map, sharing=sharing)
        rows.append((sharing, asyncio.run(measure(spec, cache, given.runs))))
    names = list(rows[0][1])
    print(f"\n{repo_id}, medians of {given.runs}\n")
    print(f"| {'':34} | " + " | ".join(f"{sharing:>12}" for sharing, _ in rows) + " |")
    print("| --- |" + " --- |" * len(rows))
    for name in names:
        print(f"| {name:34} | " + " | ".join(f"{values[name]:12,.1f}" for _, values in rows) + " |")


async def measure(spec: ModelSpec, cache: Path, runs: int) -> dict[str, float]:
    """Return the figures by name."""
    free = _used_mb()
    began = time.perf_counter()
    host = await ModelHost.start(spec, HostSettings(ready_children=0, hf_cache=cache))
    found = {"load until ready to fork, s": time.perf_counter() - began}
    try:
        found["weights, MB"] = host.facts.weights_bytes / 1e6
        loaded = _used_mb()
        found["on the devices after load, MB"] = loaded - free
        ready, jobs, checks = [], [], []
        for number in range(runs):
            began = time.perf_counter()
            runner = await host.lend()
            ready.append((time.perf_counter() - began) * 1000)
            if number == 0:
                found["a ready runner, MB"] = _used_mb() - loaded
            runner.discard()
        for _ in range(runs):
            began = time.perf_counter()
            assert not await host.check_weights()
            checks.append((time.perf_counter() - began) * 1000)
        for _ in range(runs):
            waiting = await host.lend()
            began = time.perf_counter()
            ended = await played(waiting, traces.one_read(), LIMITS)
            assert ended.values
            jobs.append((time.perf_counter() - began) * 1000)
        found["fork to ready runner, ms"] = statistics.median(ready)
        found["one read with its weights check, ms"] = statistics.median(jobs)
        found["weights check, ms"] = statistics.median(checks)
        found["weights check, GB/s"] = host.facts.weights_bytes / 1e6 / found["weights check, ms"]
    finally:
        await host.close()
    return found


def _used_mb() -> float:
    return sum(device.memory_bytes - device.free_bytes for device in hardware.gpus()) / 1e6


if __name__ == "__main__":
    main()
