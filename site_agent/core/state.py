"""What the agent knows: attempts held, models offered, pairs seen. Changed only by `changes.evolve`."""

from __future__ import annotations

from dataclasses import dataclass, field

from edif_mesh.domain.attempt import AttemptStatus, Blame
from edif_mesh.domain.ids import AttemptNumber, BootId, Digest, Epoch, FederationId, JobId, KeyId, SiteId
from edif_mesh.domain.job import Failure, Limits
from edif_mesh.domain.site import Device, ModelOffer, ModelState, SiteStatus, Versions
from edif_mesh.wire.messages import Order

AttemptKey = tuple[JobId, AttemptNumber]
Pair = tuple[Digest, AttemptNumber]


@dataclass(frozen=True, slots=True)
class Now:
    """One reading of both clocks. Windows of time use the wall clock, leases and backoff the monotonic one."""

    wall_ms: int
    """Unix, UTC."""
    monotonic_ms: int


@dataclass(frozen=True, slots=True)
class Policy:
    """What the site's operator has settled."""

    federation: FederationId
    site: SiteId
    country: str
    slots: int
    memory_bytes: int
    """For all runners together, beyond the loaded models."""
    limits: Limits
    advert_ms: int
    models_bytes: int = 0
    """For all loaded models together; 0: there is no bound."""
    min_residency_ms: int = 0
    """So long a loaded model stays, whatever else is asked for."""
    codecs: tuple[str, ...] = ("nnsight-0.8",)


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an attempt is being stopped: what its last report will say once its runner is gone."""

    status: AttemptStatus
    detail: str = ""
    failure: Failure | None = None
    blame: Blame | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """One attempt that this run of the agent has accepted and not yet ended."""

    job: JobId
    attempt: AttemptNumber
    digest: Digest
    order: Order
    epoch: Epoch
    lease_until_ms: int
    """Monotonic."""
    after_advert: int
    """The number of the last advert before it was accepted: only later ones named it to the coordinator."""
    status: AttemptStatus = AttemptStatus.ACCEPTED
    sequence: int = 0
    """Of the last report."""
    started: bool = False
    """Its model is loaded and the shell runs it."""
    computed: bool = False
    """The runner has ended; what is left is to deliver its result. It uses no slot and no lease ends it."""
    load_ms: int = 0
    """How long its model took to load, when it had to wait for that."""
    owner: KeyId = KeyId("")
    """Who signed the order, and may fetch the result."""
    ending: Ending | None = None
    """It is being stopped; it keeps its slot and its memory until its runner is gone."""

    @property
    def key(self) -> AttemptKey:
        """What names it at this site."""
        return (self.job, self.attempt)


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the catalogue."""

    offer: ModelOffer
    preload: bool = True
    """It is to be loaded without being asked for, where there is room; no longer once it was evicted."""
    queued: int = 0
    """Its place, from 1, among those whose memory is promised but not free yet; 0: it does not wait for any."""
    stays_until_ms: int = 0
    """Monotonic; not evicted before."""
    used_at_ms: int = 0
    """Monotonic; when it was loaded, or an attempt last used it."""
    failures: int = 0
    """Failed loads and lost hosts in a row."""
    retry_at_ms: int = 0
    """Monotonic; not loaded again before."""

    @property
    def loaded(self) -> bool:
        """Whether a host is ready."""
        return self.offer.state is ModelState.LOADED

    @property
    def occupies(self) -> bool:
        """Whether a process holds memory for it now."""
        state = self.offer.state
        return state in (ModelState.LOADED, ModelState.EVICTING) or (state is ModelState.LOADING and not self.queued)

    @property
    def promised(self) -> bool:
        """Whether its memory is taken or kept for it: a pinned model's always is."""
        return bool(self.queued) or self.offer.pinned or self.offer.state in (ModelState.LOADED, ModelState.LOADING)


@dataclass(slots=True)
class State:
    """Everything the core decides from; a plain value that only `evolve` changes."""

    policy: Policy
    boot: BootId
    devices: tuple[Device, ...] = ()
    versions: Versions = Versions()
    sandbox: str = ""
    """The confinement profile that passed its self-test; empty: this site runs nothing."""
    status: SiteStatus = SiteStatus.ACTIVE
    epoch: Epoch = Epoch(0)
    """The highest seen; never falls."""
    advert_sequence: int = 0
    renewed_sequence: int = 0
    """Of the newest advert whose answer has been applied."""
    held: dict[AttemptKey, Held] = field(default_factory=dict)
    seen: dict[Pair, int] = field(default_factory=dict)
    """Every accepted or declined pair, with the instant (Unix ms) at which its order can no longer start."""
    barred: dict[AttemptKey, int] = field(default_factory=dict)
    """Attempts that were stopped before their grant came, with the instant at which that is forgotten."""
    unsent: dict[AttemptKey, int] = field(default_factory=dict)
    """The sequence of the newest report of each attempt that waits for its acknowledgement."""
    models: dict[str, Model] = field(default_factory=dict)
    """By repo id."""
    dropped: tuple[JobId, ...] = ()
    """Deleted jobs of which nothing is held any more, as the coordinator last named them."""
    note: str = ""
    """Why this site runs nothing, for as long as the agent lives; empty: it does."""
    trouble: str = ""
    """Why the journal cannot be written at present; empty: it can."""

    @property
    def computing(self) -> list[Held]:
        """The attempts that use a slot."""
        return [item for item in self.held.values() if not item.computed]

    @property
    def free_slots(self) -> int:
        """How many more attempts may be accepted now."""
        return max(0, self.policy.slots - len(self.computing))

    @property
    def free_memory_bytes(self) -> int:
        """What running attempts have not reserved."""
        return max(0, self.policy.memory_bytes - sum(item.order.limits.memory_bytes for item in self.computing))

    @property
    def free_models_bytes(self) -> int:
        """What no model takes or has promised; 0 also where there is no bound."""
        taken = sum(model.offer.takes_bytes for model in self.models.values() if model.promised)
        return max(0, self.policy.models_bytes - taken)
