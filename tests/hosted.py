"""A real model host of the tiny GPT-2 for tests of runners: lend one, run a payload, look at how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from edif_mesh.domain.job import Limits
from edif_mesh.results import archive
from site_agent.hosting.lender import ModelHost
from site_agent.hosting.process import HostSettings
from site_agent.hosting.spec import ModelSpec
from site_agent.runner.events import ResultChunk, ResultCut, RunnerFailed, RunnerLog, RunnerSucceeded
from site_agent.runner.supervisor import Runner, RunOptions
from tests import models, traces

LIMITS = Limits(wall_ms=30_000, memory_bytes=512 << 20, result_bytes=64 << 20, log_bytes=100_000)


@dataclass
class Run:
    """Everything that a runner said of one job."""

    end: RunnerSucceeded | RunnerFailed | None = None
    log: str = ""
    data: bytearray = field(default_factory=bytearray)
    cuts: list[int] = field(default_factory=list)
    """Where chunks should end, in bytes of the archive."""
    order: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        """The saved values; fails the test when the job failed."""
        assert isinstance(self.end, RunnerSucceeded), self.end
        return archive.read(bytes(self.data))

    @property
    def failure(self) -> RunnerFailed:
        """The failure; fails the test when the job succeeded."""
        assert isinstance(self.end, RunnerFailed), self.end
        return self.end


@contextlib.asynccontextmanager
async def tiny_host(ready: int = 1, **settings: Any) -> AsyncIterator[ModelHost]:
    """A host of the tiny model, by default under the weakest profile; closed at the end. `settings` as in HostSettings."""
    async with a_host(models.tiny_gpt2(), ready, **settings) as host:
        yield host


@contextlib.asynccontextmanager
async def a_host(repo_id: str, ready: int = 1, *, sharing: str = "", **settings: Any) -> AsyncIterator[ModelHost]:
    """A host of a test model, with `sharing` as in ModelSpec; closed at the end."""
    host = await ModelHost.start(
        ModelSpec(repo_id, sharing=sharing), HostSettings(ready_children=ready, hf_cache=models.cache(), **settings)
    )
    try:
        yield host
    finally:
        await host.close()


async def run(host: ModelHost, payload: bytes, limits: Limits = LIMITS, **options: Any) -> Run:
    """Run `payload` in a lent runner to its end."""
    return await played(await host.lend(), payload, limits, **options)


async def played(runner: Runner, payload: bytes, limits: Limits = LIMITS, **options: Any) -> Run:
    """Run `payload` in `runner` to its end; exactly one terminal event must come, last."""
    result = Run()
    async for event in runner.run(payload, RunOptions(limits=limits, **options)):
        assert result.end is None, "something came after the terminal event"
        result.order.append(type(event).__name__)
        match event:
            case RunnerLog(text):
                result.log += text
            case ResultChunk(data):
                result.data += data
            case ResultCut():
                result.cuts.append(len(result.data))
            case RunnerSucceeded() | RunnerFailed():
                result.end = event
            case _:
                pass
    assert result.end is not None
    return result


def code(source: str) -> bytes:
    """Return a trace whose block executes `source`, which may define `outcome`; it is saved."""

    def body(model: Any, capture: Any) -> None:
        with model.trace("Hello world", backend=capture):
            scope: dict[str, Any] = {"model": model}
            exec(source, scope)
            outcome = scope.get("outcome").save()

    return traces.payload(body)
