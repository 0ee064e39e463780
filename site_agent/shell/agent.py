"""One site agent: its parts, put together, and its life from the first advert to the last report."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable

from edif_mesh.config import SiteConfig
from edif_mesh.domain.ids import BootId
from edif_mesh.domain.site import SandboxProfile
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import TrustStore
from edif_mesh.transport.ports import Bus, Streams, Subscription
from edif_mesh.wire import subjects
from site_agent import hardware
from site_agent.core.effects import (
    DropJobs,
    DropResult,
    Effect,
    EvictModel,
    KillAttempt,
    LoadModel,
    SendAdvert,
    SendReport,
    StartAttempt,
)
from site_agent.core.events import DrainRequested, Restarted, Ticked
from site_agent.core.state import Model, Policy, State
from site_agent.direct.keeper import DirectKeeper
from site_agent.hosting.process import HostSettings
from site_agent.journal import Journal
from site_agent.runner.selftest import choose
from site_agent.shell.attempts import Attempts, Equipment
from site_agent.shell.budget import Shares, offered
from site_agent.shell.bulk import Cargo
from site_agent.shell.catalogue import hf_cache
from site_agent.shell.heartbeat import Heartbeat
from site_agent.shell.inbox import Inbox
from site_agent.shell.loop import AgentLoop
from site_agent.shell.models import ModelKeeper
from site_agent.shell.outbox import Outbox

log = logging.getLogger(__name__)

_TICK_S = 0.25
_FORGET_EVERY_TICKS = 2_400
_NEVER_MS = 1 << 62
"""A model that is not on this machine, or has no sandbox to run in, is not tried again; mending that takes a restart."""


class SiteAgent:
    """The agent of one site over open connections; `cargo` carries payloads and results."""

    def __init__(
        self, config: SiteConfig, key: PrivateKey, trust: TrustStore, journal: Journal, bus: Bus, streams: Streams,
        cargo: Cargo, direct: DirectKeeper | None = None,
    ) -> None:  # fmt: skip
        self._config, self._journal, self._bus = config, journal, bus
        self._direct = direct
        self._remembered = journal.load()
        entries, shares = offered(config)
        chosen = choose(config)
        if chosen.profile is None:
            log.error("no sandbox", extra={"text": chosen.sentence()})
        else:
            log.info("sandbox chosen", extra={"profile": chosen.profile, "text": chosen.sentence()})
        state = State(
            policy=policy_of(config, shares),
            boot=BootId(secrets.token_hex(8)),
            devices=hardware.devices(),
            versions=hardware.versions(),
            sandbox=chosen.profile or "",
            note="" if chosen.profile else chosen.sentence(),
            epoch=self._remembered.epoch,
            # Beyond every number that an earlier boot has used: an old answer can never match a new advert.
            advert_sequence=time.time_ns() // 1_000_000,
            seen=self._remembered.seen,
            barred=self._remembered.barred,
            unsent={(report.job, report.attempt): report.sequence for report in self._remembered.reports},
            models={
                entry.offer.repo_id: Model(
                    entry.offer, entry.preload, retry_at_ms=_NEVER_MS if entry.problem or not chosen.profile else 0
                )
                for entry in entries
            },
        )
        self.loop = AgentLoop(state, journal, self._act)
        self.outbox = Outbox(self.loop, trust, key, bus)
        self.heartbeat = Heartbeat(self.loop, trust, key, bus)
        self._inbox = Inbox(self.loop, trust, key, bus)
        self._models = ModelKeeper(
            [entry.spec for entry in entries],
            HostSettings(
                ready_children=config.ready_children,
                hf_cache=hf_cache(config),
                sandbox=chosen.profile or SandboxProfile(config.least_sandbox),
                sandbox_command=config.sandbox_command,
            ),
            config.state_dir / "logs",
            self.loop.handle,
        )
        self._attempts = Attempts(
            Equipment(
                site=config.site,
                key=key,
                streams=streams,
                cargo=cargo,
                models=self._models,
                limits=config.limits,
                threads=config.threads,
                spool_dir=config.state_dir / "spool",
                tell=self.loop.handle,
                sandbox=state.sandbox,
                direct=direct,
            )
        )
        self.loop.prepare = lambda effect: self._attempts.start(effect.held)
        self.loop.withdraw = lambda effect: self._attempts.kill(effect.held.key, "it could not be accepted")
        self._tasks: list[asyncio.Task[None]] = []
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Report what the last run left, listen, load, advertise. Returns at once; `heartbeat.answered` says more."""
        for report in self._remembered.reports:
            self.outbox.put(report)
        await self.loop.handle(Restarted(self._remembered.orphans))
        self._bus.on_link(self._link_changed)
        self._subscription = await self._bus.subscribe(
            subjects.site_orders(self._config.site), self._inbox, concurrent=16
        )
        self._tasks = [
            asyncio.create_task(self._forever(self._tick), name="tick"),
            asyncio.create_task(self._forever(self.heartbeat.run), name="heartbeat"),
        ]
        if self._direct is not None:
            self._tasks.append(asyncio.create_task(self._forever(self._direct.run), name="direct"))
        await self.loop.handle(Ticked())

    async def drain(self, deadline_s: float) -> None:
        """Start nothing more, hand running attempts back, and wait until that is acknowledged or the deadline."""
        await self.loop.handle(DrainRequested())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._attempts.finished()
                await self.outbox.idle.wait()

    async def close(self) -> None:
        """End every task and every process; what was not acknowledged is in the journal."""
        if self._subscription is not None:
            await self._subscription.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._attempts.close()
        await self._models.close()
        await self.heartbeat.close()
        await self.outbox.close()
        self.loop.close()
        self._journal.close()

    def _act(self, effect: Effect) -> None:
        match effect:
            case StartAttempt(held):
                self._attempts.start(held)
            case KillAttempt(key, reason):
                self._attempts.kill(key, reason)
            case SendReport(report):
                self.outbox.put(report)
            case LoadModel(repo_id):
                self._models.load(repo_id, self.loop.state.models[repo_id].offer)
            case EvictModel(repo_id):
                self._models.evict(repo_id)
            case SendAdvert():
                self.heartbeat.soon()
            case DropResult():
                pass
            case DropJobs(jobs):
                self._attempts.drop(jobs)

    def _link_changed(self, connected: bool) -> None:
        if connected:
            self.outbox.link_returned()
            self.heartbeat.soon()

    async def _tick(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(_TICK_S)
            ticks += 1
            await self.loop.handle(Ticked(forget=ticks % _FORGET_EVERY_TICKS == 0))

    async def _forever(self, work: Callable[[], object]) -> None:
        """Run `work` again when it fails: a bug there must not silence the site."""
        while True:
            try:
                await work()  # type: ignore[misc]
            except Exception:
                log.exception("a task of the agent failed and starts again")
                await asyncio.sleep(1)


def policy_of(config: SiteConfig, shares: Shares) -> Policy:
    """Return the operator's settings as the core knows them."""
    return Policy(
        federation=config.federation,
        site=config.site,
        country=config.country,
        slots=config.slots,
        memory_bytes=shares.runners_bytes,
        limits=config.limits,
        advert_ms=config.advert_ms,
        models_bytes=shares.models_bytes,
        min_residency_ms=config.min_residency_s * 1000,
    )
