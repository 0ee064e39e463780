"""The model hosts of this site: loads what the core asks for, tells it of progress, failure and death."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path

from edif_mesh.domain.site import ModelOffer, ModelState
from edif_mesh.errors import EdifError, RunnerError
from site_agent.core.events import Event, HostLost, ModelEvicted, ModelFailed, ModelLoaded, ModelProgressed
from site_agent.hosting.footprint import memory_bytes, resident_bytes
from site_agent.hosting.lender import ModelHost
from site_agent.hosting.process import HostSettings
from site_agent.hosting.spec import ModelSpec
from site_agent.runner.supervisor import Runner

log = logging.getLogger(__name__)


_ALARM_GRACE_S = 1.0
"""Attempts on a host with changed weights say first what stopped them: "the host is gone" would be the site's fault alone."""


class ModelKeeper:
    """One host a loaded model, by repo id."""

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        settings: HostSettings,
        log_dir: Path,
        tell: Callable[[Event], Awaitable[object]],
    ) -> None:
        self._specs = {spec.repo_id: spec for spec in specs}
        self._settings, self._log_dir, self._tell = settings, log_dir, tell
        self._hosts: dict[str, ModelHost] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarms: dict[str, str] = {}
        """Of models whose weights a job has changed: advertised until the agent ends, for the operator to see."""
        self._aliases: dict[str, tuple[str, ...]] = {}

    def load(self, repo_id: str, offer: ModelOffer) -> None:
        """Start a host for `repo_id`; `ModelLoaded` or `ModelFailed` follows, later perhaps `HostLost`."""
        self._spawn(self._load(self._specs[repo_id], offer), f"host {repo_id}")

    def evict(self, repo_id: str) -> None:
        """End the model's host; `ModelEvicted` follows when nothing of it is left in memory."""
        self._spawn(self._evict(repo_id), f"evict {repo_id}")

    async def lend(self, repo_id: str) -> Runner:
        """Return a ready runner; raises RunnerError when the host is gone."""
        host = self._hosts.get(repo_id)
        if host is None:
            raise RunnerError(f"The process that held {repo_id} is gone.")
        return await host.lend()

    def replenish(self, repo_id: str) -> None:
        """A runner has ended: fork the next one."""
        if (host := self._hosts.get(repo_id)) is not None:
            host.replenish()

    async def close(self) -> None:
        """End all hosts and their runners."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(host.close() for host in self._hosts.values()), return_exceptions=True)
        self._hosts.clear()

    async def _load(self, spec: ModelSpec, offer: ModelOffer) -> None:
        repo_id = spec.repo_id
        self._log_dir.mkdir(parents=True, exist_ok=True)
        settings = replace(self._settings, log_file=self._log_dir / f"host-{repo_id.replace('/', '--')}.log")
        try:
            host = await ModelHost.start(spec, settings, lambda text: self._progressed(repo_id, text))
        except (EdifError, OSError) as error:
            log.error("model not loaded", extra={"model": repo_id, "text": str(error)})
            await self._tell(ModelFailed(repo_id, str(error)))
            return
        self._hosts[repo_id] = host
        facts = host.facts
        log.info("model loaded", extra={"model": repo_id, "load_ms": facts.load_ms, "pid": facts.pid})
        loaded = replace(
            offer,
            state=ModelState.LOADED,
            dtype=facts.dtype,
            weights_bytes=facts.weights_bytes,
            # Shared weights are not in that process: they, and their GPU, are reckoned.
            memory_bytes=memory_bytes(facts.weights_bytes, 0 if facts.sharing else resident_bytes(facts.pid)),
            load_ms=facts.load_ms,
            attn_implementation=facts.attn_implementation,
            detail=self._alarms.get(repo_id, ""),
            device=facts.device,
        )
        await self._tell(ModelLoaded(loaded))
        why = await asyncio.shield(host.closed)
        if self._hosts.get(repo_id) is not host:
            return  # evicted
        log.error("host lost", extra={"model": repo_id, "text": why})
        del self._hosts[repo_id]
        if host.alarm:
            self._alarms[repo_id] = host.alarm
            await asyncio.sleep(_ALARM_GRACE_S)
        await self._tell(HostLost(repo_id, why))
        await host.close()

    async def _evict(self, repo_id: str) -> None:
        host = self._hosts.pop(repo_id, None)
        if host is not None:
            await host.close()
        log.info("model evicted", extra={"model": repo_id})
        await self._tell(ModelEvicted(repo_id))

    def _progressed(self, repo_id: str, text: str) -> None:
        async def tell() -> None:
            await self._tell(ModelProgressed(repo_id, text))

        self._spawn(tell(), "progress")

    def _spawn(self, work: object, name: str) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
