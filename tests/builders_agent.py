"""A desk at which the core of a site agent decides in virtual time, with a shell that loads and evicts when it is told to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from edif_mesh.domain.attempt import AttemptStatus, Receipt
from edif_mesh.domain.ids import AttemptNumber, BootId, Digest, Epoch, FederationId, JobId, SiteId
from edif_mesh.domain.job import Limits
from edif_mesh.domain.site import ModelOffer, ModelRef, ModelState, Versions
from edif_mesh.wire.messages import Grant, Order, PayloadRef, Report, Role
from site_agent.core import events as ev
from site_agent.core.changes import evolve
from site_agent.core.decision import decide
from site_agent.core.effects import Effect, EvictModel, KillAttempt, LoadModel, SendReport, StartAttempt
from site_agent.core.state import AttemptKey, Model, Now, Policy, State

SITE, FEDERATION = SiteId("ansbach"), FederationId("fed")
T0 = 1_800_000_000_000


def an_offer(repo_id: str, size: int, **fields: Any) -> ModelOffer:
    """A model that could be loaded and then takes `size` bytes."""
    offer = ModelOffer(repo_id, "c0ffee", "text-generation", "float32", ModelState.LOADABLE, size, 1, memory_bytes=size)
    return replace(offer, **fields)


@dataclass
class AgentDesk:
    """One site; `models` are its offers, by default none of them loaded at start."""

    models: list[ModelOffer]
    budget: int
    residency_ms: int = 0
    slots: int = 8
    preload: tuple[str, ...] = ()
    now: Now = Now(T0, 1_000_000)
    loading: list[str] = field(default_factory=list)
    evicting: list[str] = field(default_factory=list)
    running: dict[AttemptKey, str] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    done: list[Effect] = field(default_factory=list)
    _jobs: int = 0

    def __post_init__(self) -> None:
        policy = Policy(
            FEDERATION, SITE, "DE", self.slots, 1 << 40, Limits(), 5_000, models_bytes=self.budget,
            min_residency_ms=self.residency_ms,
        )  # fmt: skip
        models = {o.repo_id: Model(o, o.pinned or o.repo_id in self.preload) for o in self.models}
        self.state = State(policy, BootId("b"), sandbox="base", models=models)

    def happens(self, event: ev.Event) -> list[Effect]:
        """Decide, record, and act as the shell does; returns the effects."""
        decision = decide(event, self.state, self.now)
        for change in decision.record:
            evolve(self.state, change)
        for effect in decision.act:
            match effect:
                case LoadModel(repo_id):
                    self.loading.append(repo_id)
                case EvictModel(repo_id):
                    self.evicting.append(repo_id)
                case StartAttempt(held):
                    self.running[held.key] = held.order.model.repo_id
                case KillAttempt(key, _):
                    self.running.pop(key, None)
                case SendReport(report):
                    self.reports.append(report)
                case _:
                    pass
        self.done += decision.act
        return list(decision.act)

    def ticks(self, ms: int = 250) -> list[Effect]:
        """Let time pass; leases never end here."""
        self.now = Now(self.now.wall_ms + ms, self.now.monotonic_ms + ms)
        return self.happens(ev.Ticked())

    def asks(self, repo_id: str) -> AttemptKey:
        """An order for the model is granted to the site."""
        self._jobs += 1
        job, digest = JobId(f"j{self._jobs:023x}"), Digest(f"{self._jobs:064x}")
        order = Order(
            FEDERATION, job, "n", self.now.wall_ms, self.now.wall_ms, self.now.wall_ms + 86_400_000,
            PayloadRef(Digest("0" * 64), 3), ModelRef(repo_id), Versions(), limits=Limits(memory_bytes=1),
        )  # fmt: skip
        grant = Grant(
            digest, job, SITE, AttemptNumber(1), Epoch(1), self.now.wall_ms, 1 << 40, self.now.wall_ms + 60_000
        )
        self.happens(ev.GrantReceived(grant, order, digest, ev.Signer("ada", Role.RESEARCHER)))
        return (job, AttemptNumber(1))

    def loaded(self, repo_id: str, size: int | None = None) -> list[Effect]:
        """The host that is being started is ready, and takes `size` bytes as measured."""
        self.loading.remove(repo_id)
        offer = self.state.models[repo_id].offer
        return self.happens(ev.ModelLoaded(replace(offer, memory_bytes=size or offer.memory_bytes)))

    def evicted(self, repo_id: str) -> list[Effect]:
        """The host that was to end is gone."""
        self.evicting.remove(repo_id)
        return self.happens(ev.ModelEvicted(repo_id))

    def ends(self, key: AttemptKey) -> None:
        """A running attempt succeeds."""
        del self.running[key]
        self.happens(ev.AttemptComputed(key))
        self.happens(ev.AttemptSucceeded(key, "manifest", Receipt()))

    def uses(self, repo_id: str) -> None:
        """An attempt of a loaded model runs and ends, a second later."""
        self.now = Now(self.now.wall_ms + 1000, self.now.monotonic_ms + 1000)
        self.ends(self.asks(repo_id))

    def offer(self, repo_id: str) -> ModelOffer:
        """What the site says of the model now."""
        return self.state.models[repo_id].offer

    def states(self) -> dict[str, str]:
        """Every model's state."""
        return {name: model.offer.state.value for name, model in self.state.models.items()}

    def last(self, key: AttemptKey) -> Report:
        """The newest report of an attempt."""
        return [report for report in self.reports if (report.job, report.attempt) == key][-1]

    def declined(self, repo_id: str) -> str:
        """Ask for the model; return the sentence with which the site declines."""
        report = self.last(self.asks(repo_id))
        assert report.status is AttemptStatus.DECLINED, report
        assert report.failure is not None
        assert report.failure.code == "no_room", report
        return report.failure.text
