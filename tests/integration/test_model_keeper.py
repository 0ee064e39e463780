"""Real hosts that are loaded and evicted by the keeper of models: reckoned sizes, and memory that is really free."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import psutil
import pytest

from edif_mesh.domain.site import ModelOffer, ModelState
from edif_mesh.models import resolve_model
from site_agent.core.events import Event, HostLost, ModelEvicted, ModelFailed, ModelLoaded, ModelProgressed
from site_agent.hosting.footprint import HOST_BYTES, estimate_weights_bytes
from site_agent.hosting.process import HostSettings
from site_agent.hosting.spec import ModelSpec
from site_agent.runner.supervisor import Runner
from site_agent.shell.models import ModelKeeper
from tests import models


class Heard:
    """What the keeper tells the core; `alive` are the model processes that were there when it told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.alive: list[set[int]] = []
        self._news = asyncio.Event()

    async def tell(self, event: Event) -> None:
        self.events.append(event)
        self.alive.append(hosts())
        self._news.set()

    async def until(self, *kinds: type) -> Event:
        async with asyncio.timeout(60):
            while not (self.events and isinstance(self.events[-1], kinds)):
                self._news.clear()
                await self._news.wait()
        return self.events[-1]


def hosts() -> set[int]:
    """The processes of ours that hold a model or are runners of one."""
    found = psutil.Process().children(recursive=True)
    return {p.pid for p in found if p.status() != psutil.STATUS_ZOMBIE}


def an_offer(spec: ModelSpec) -> ModelOffer:
    return ModelOffer(spec.repo_id, "r", spec.task, "float32", ModelState.LOADABLE, spec.weights_bytes, 1)


def a_spec(repo_id: str, dtype: str = "auto", attention: str = "") -> ModelSpec:
    folder = resolve_model(repo_id, cache=models.cache()).path
    return ModelSpec(
        repo_id, dtype=dtype, attn_implementation=attention, weights_bytes=estimate_weights_bytes(folder, dtype)
    )


@pytest.mark.parametrize(
    ("build", "dtype", "attention"),
    [
        (models.tiny_gpt2, "auto", ""),
        pytest.param(models.gpt2_shape, "auto", "", marks=pytest.mark.slow),
        pytest.param(models.gpt2_shape, "bfloat16", "eager", marks=pytest.mark.slow),
    ],
    ids=["tiny", "124M", "124M in bfloat16"],
)
async def test_what_was_reckoned_is_what_is_loaded_and_an_evicted_model_leaves_nothing(
    build: object, dtype: str, attention: str, tmp_path: Path
) -> None:
    spec, heard = a_spec(build(), dtype, attention), Heard()  # type: ignore[operator]
    keeper = ModelKeeper([spec], HostSettings(ready_children=2, hf_cache=models.cache()), tmp_path, heard.tell)
    before, late = hosts(), await asyncio.create_subprocess_exec("sleep", "600")
    try:
        keeper.load(spec.repo_id, an_offer(spec))
        loaded = await heard.until(ModelLoaded, ModelFailed)
        assert isinstance(loaded, ModelLoaded), loaded
        offer = loaded.offer
        assert abs(offer.weights_bytes - spec.weights_bytes) <= 0.01 * spec.weights_bytes
        assert offer.dtype == ("float32" if dtype == "auto" else dtype)
        assert offer.attn_implementation == (attention or "sdpa")
        reckoned = spec.weights_bytes + HOST_BYTES
        assert 0.6 * reckoned < offer.memory_bytes < 1.1 * reckoned, (offer.memory_bytes, reckoned)
        said = [event.detail for event in heard.events if isinstance(event, ModelProgressed)]
        size = (
            f"{spec.weights_bytes / 1e9:.2f} GB" if spec.weights_bytes > 10**8 else f"{spec.weights_bytes / 1e6:.1f} MB"
        )
        assert f"loading weights, 0 % of {size} in memory" in said
        await keeper.lend(spec.repo_id)
        (host,) = keeper._hosts.values()
        # No runner outlives a SIGKILL for long; this one stands for the moment in which it still holds memory.
        ours, theirs = socket.socketpair()
        host._children[-1] = stand_in = Runner(ours, late.pid, "cpu")
        keeper.evict(spec.repo_id)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(heard.until(ModelEvicted), 1)
        assert not psutil.pid_exists(host.facts.pid), "the host itself was not ended"
        late.kill()
        await heard.until(ModelEvicted)
        stand_in.discard()
        theirs.close()
        assert heard.alive[-1] <= before, "a process of the evicted model was there when its memory was called free"
        assert not [event for event in heard.events if isinstance(event, HostLost)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            late.kill()
        await late.wait()
        await keeper.close()


async def test_a_model_whose_host_has_died_by_itself_is_evicted_all_the_same(tmp_path: Path) -> None:
    heard = Heard()
    keeper = ModelKeeper([ModelSpec("m/a")], HostSettings(), tmp_path, heard.tell)
    keeper.evict("m/a")
    assert await heard.until(ModelEvicted) == ModelEvicted("m/a")
    await keeper.close()
