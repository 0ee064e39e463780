"""What every GPU test needs: a device, or the reason why there is none, found without starting CUDA in the test's own process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from edif_mesh.domain.job import Limits
from site_agent import hardware
from site_agent.hosting.lender import ModelHost
from site_agent.hosting.process import HostSettings
from site_agent.hosting.spec import ModelSpec
from tests import models

MISSING = (
    "" if hardware.cuda_devices() else f"no GPU: the driver shows {len(hardware.gpus())}, torch is {version('torch')}"
)
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
GPU_LIMITS = Limits(wall_ms=60_000, memory_bytes=2 << 30, result_bytes=64 << 20, log_bytes=100_000)


@contextlib.asynccontextmanager
async def gpu_host(
    sharing: str = "cuda", repo_id: str = "", ready: int = 1, device: str = "cuda:0", **spec: Any
) -> AsyncIterator[ModelHost]:
    """A host of a test model on a GPU; closed at the end. Its log is kept in `.models` for whoever looks for the reason."""
    log = Path(models.ROOT).parent / "gpu-host.log"
    log.parent.mkdir(exist_ok=True)
    host = await ModelHost.start(
        ModelSpec(repo_id or models.tiny_gpt2(), device=device, sharing=sharing, **spec),
        HostSettings(ready_children=ready, hf_cache=models.cache(), log_file=log),
    )
    try:
        yield host
    finally:
        await host.close()


def used_bytes(number: int = 0) -> int:
    """What is in use on a device, by the driver's word."""
    device = hardware.gpus()[number]
    return device.memory_bytes - device.free_bytes
