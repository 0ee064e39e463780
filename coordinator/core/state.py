"""What the coordinator knows: records (what storage keeps), the changes that make them, and the indexes over them."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass, field

from edif_mesh.domain.attempt import AttemptStatus, Receipt
from edif_mesh.domain.ids import AttemptNumber, BootId, Digest, Epoch, FederationId, JobId, KeyId, SiteId
from edif_mesh.domain.job import Failure, JobClass, JobStatus
from edif_mesh.domain.site import SiteStatus
from edif_mesh.wire.messages import Advert, Order, SiteVerdict


@dataclass(frozen=True, slots=True)
class Policy:
    """The coordinator's times (ms) and bounds; from its settings, constant within a term."""

    lease_ms: int = 30_000
    margin_ms: int = 2_000
    """What the coordinator waits beyond a lease: the site counts from before it heard of it."""
    suspect_ms: int = 15_000
    disconnect_grace_ms: int = 2_000
    grant_repeat_ms: int = 1_000
    max_losses: int = 4
    """Attempts that a job may lose to sites (not to itself) before it fails."""
    max_crashes: int = 2
    """Runner crashes after which a job is quarantined."""
    retry_backoff_ms: int = 500
    max_payload_bytes: int = 1 << 30
    max_freeze_ms: int = 120_000
    keep_results_ms: int = 7 * 86_400_000
    max_kept_bytes: int = 200 << 30
    """Of one researcher's results."""
    max_site_kept_bytes: int = 1 << 40
    """Of the results of one site."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is kept of a job's result, and how far its deletion is."""

    stored_bytes: int
    until_ms: int
    lenders: tuple[JobId, ...] = ()
    """Jobs whose chunks it uses again."""
    deleted_at_ms: int | None = None
    """When its owner asked for the deletion."""
    drop_at: tuple[SiteId, ...] = ()
    """Sites that have still to say that they hold nothing of it."""
    purged: bool = False
    """The broker holds nothing of it any more."""

    @property
    def deleting(self) -> bool:
        """Whether something has still to be deleted."""
        return self.deleted_at_ms is not None and (bool(self.drop_at) or not self.purged)


@dataclass(frozen=True, slots=True)
class Kept:
    """A kept result in the index over all of them; it stays there when its job has left memory."""

    job: JobId
    owner: KeyId
    site: SiteId
    stored_bytes: int
    until_ms: int
    lenders: tuple[JobId, ...]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job, whole: the order as signed, where it stands, and what it has been through."""

    job: JobId
    version: int
    status: JobStatus
    order: Order
    order_digest: Digest
    order_envelope: str
    owner: KeyId
    owner_name: str
    organisation: str
    submitted_at_ms: int
    updated_at_ms: int
    attempt: AttemptNumber = AttemptNumber(0)
    """The newest attempt's number; 0 before the first."""
    losses: int = 0
    crashes: int = 0
    tried: tuple[SiteId, ...] = ()
    """Sites where an attempt failed for a reason that is not the job's; used again only when no other is left."""
    not_before_ms: int = 0
    """Back-off: not placed before this instant."""
    text: str = ""
    failure: Failure | None = None
    manifest: str | None = None
    result_site: SiteId | None = None
    keeping: Keeping | None = None

    @property
    def terminal(self) -> bool:
        """Whether the job has ended for ever."""
        return self.status.terminal


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt: the fence that older reports lose against is its number, the term that granted it its epoch."""

    job: JobId
    attempt: AttemptNumber
    site: SiteId
    status: AttemptStatus
    epoch: Epoch
    granted_at_ms: int
    deadline_at_ms: int
    """When the lease has lapsed for certain, on the coordinator's clock."""
    sent_at_ms: int = 0
    answered: bool = False
    boot: BootId | None = None
    sequence: int = 0
    missing: int = 0
    """Adverts in a row that did not list it."""
    started_at_ms: int | None = None
    ended_at_ms: int | None = None
    stop_reason: str | None = None
    """Set while the site has still to be told to stop."""
    detail: str = ""
    failure: Failure | None = None
    receipt: Receipt | None = None
    verdicts: tuple[SiteVerdict, ...] = ()

    @property
    def active(self) -> bool:
        """Whether it may still run, or still has to be stopped."""
        return not self.status.terminal or self.stop_reason is not None


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """One site as last heard."""

    site: SiteId
    status: SiteStatus
    advert: Advert
    seen_at_ms: int
    disconnected_at_ms: int | None = None
    trouble: int = 0
    """Attempts lost or failed here by the site's fault, lately; falls with every success."""


@dataclass(frozen=True, slots=True)
class JobChanged:
    """The job's record is now this."""

    record: JobRecord


@dataclass(frozen=True, slots=True)
class AttemptChanged:
    """The attempt's record is now this."""

    record: AttemptRecord


@dataclass(frozen=True, slots=True)
class SiteChanged:
    """The site's record is now this. `durable` is false for a mere sign of life, which storage may skip."""

    record: SiteRecord
    durable: bool = True


@dataclass(frozen=True, slots=True)
class TermChanged:
    """A new term has begun."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Audited:
    """One line of the audit log: exactly one for each transition."""

    at_ms: int
    what: str
    job: JobId | None = None
    attempt: AttemptNumber | None = None
    site: SiteId | None = None
    text: str = ""


Change = JobChanged | AttemptChanged | SiteChanged | TermChanged | Audited
AttemptKey = tuple[JobId, AttemptNumber]
QueueKey = tuple[int, int, JobId]


def queue_key(job: JobRecord) -> QueueKey:
    """Interactive before batch, then by time of submission."""
    return (0 if job.order.job_class is JobClass.INTERACTIVE else 1, job.submitted_at_ms, job.job)


@dataclass
class MeshState:
    """All records in memory, with the indexes that decisions need. Changed only by `evolve`."""

    federation: FederationId
    policy: Policy = field(default_factory=Policy)
    epoch: Epoch = Epoch(0)
    jobs: dict[JobId, JobRecord] = field(default_factory=dict)
    attempts: dict[AttemptKey, AttemptRecord] = field(default_factory=dict)
    sites: dict[SiteId, SiteRecord] = field(default_factory=dict)
    queue: list[QueueKey] = field(default_factory=list)
    lines: dict[tuple[int, KeyId], list[QueueKey]] = field(default_factory=dict)
    """The queue again, by class and owner; no line is empty."""
    served_s: dict[KeyId, float] = field(default_factory=dict)
    """What each owner was charged for grants, in expected seconds (see `queue.py`)."""
    served_now_s: float = 0.0
    """The charge of the owner served last: where a newcomer starts."""
    active: dict[AttemptKey, None] = field(default_factory=dict)
    active_at: dict[SiteId, set[AttemptKey]] = field(default_factory=dict)
    expiries: list[tuple[int, JobId]] = field(default_factory=list)
    run_ms: dict[str, float] = field(default_factory=dict)
    """Moving average of run time by model, for the ETA."""
    link_lost_at_ms: int | None = None
    frozen_until_ms: int = 0
    frozen_since_ms: int | None = None
    unjudged: dict[JobId, None] = field(default_factory=dict)
    """Jobs that were queued, or recovered, before any site was known: nobody could tell whether they can ever run."""
    first_heard_at_ms: int | None = None
    """When the first site spoke in this process's life."""
    kept: dict[JobId, Kept] = field(default_factory=dict)
    kept_bytes: dict[KeyId, int] = field(default_factory=dict)
    kept_bytes_at: dict[SiteId, int] = field(default_factory=dict)
    borrowed: dict[JobId, set[JobId]] = field(default_factory=dict)
    """By lender: the kept results that use its chunks."""
    expiring: list[tuple[int, JobId]] = field(default_factory=list)
    """A heap of the kept results, by the instant until which."""
    deleting: dict[JobId, None] = field(default_factory=dict)
    store_full: str = ""
    """Why the broker can take no new order now; empty: it can. Measured, not recorded."""
    ticked_at_ms: int | None = None
    """The last tick: a long gap means that the coordinator itself stood still."""


def evolve(state: MeshState, change: Change) -> None:
    """Apply one recorded change: last write per key, indexes kept in step."""
    match change:
        case JobChanged(record):
            _put_job(state, record)
        case AttemptChanged(record):
            _put_attempt(state, record)
        case SiteChanged(record):
            state.sites[record.site] = record
        case TermChanged(epoch):
            state.epoch = epoch
        case Audited():
            pass


def forget_job(state: MeshState, job: JobId) -> None:
    """Drop a terminal job from memory; its rows stay in storage."""
    record = state.jobs.get(job)
    if record is None or not record.terminal or job in state.deleting:
        return
    keys = [(job, AttemptNumber(number)) for number in range(1, record.attempt + 1)]
    if any(key in state.active for key in keys):
        return
    del state.jobs[job]
    for key in keys:
        state.attempts.pop(key, None)


def _put_job(state: MeshState, record: JobRecord) -> None:
    old = state.jobs.get(record.job)
    state.jobs[record.job] = record
    was, now = old is not None and old.status is JobStatus.QUEUED, record.status is JobStatus.QUEUED
    if was and not now:
        assert old is not None
        _leave_queue(state, old)
    elif now and not was:
        _enter_queue(state, record)
    if old is None and now and not state.sites:
        state.unjudged[record.job] = None
    keep(state, record)
    if old is None and not record.terminal:
        heapq.heappush(state.expiries, (record.order.expires_at_ms, record.job))


def keep(state: MeshState, record: JobRecord) -> None:
    """Bring the index of kept results in step with a job's record."""
    keeping = record.keeping
    if keeping is not None and keeping.deleting:
        state.deleting[record.job] = None
    else:
        state.deleting.pop(record.job, None)
    wanted = keeping is not None and keeping.deleted_at_ms is None and (keeping.stored_bytes > 0 or keeping.lenders)
    if not wanted or keeping is None or record.result_site is None:
        unkeep(state, record.job)
    elif record.job not in state.kept:
        kept = Kept(
            record.job, record.owner, record.result_site, keeping.stored_bytes, keeping.until_ms, keeping.lenders
        )
        state.kept[record.job] = kept
        heapq.heappush(state.expiring, (kept.until_ms, kept.job))
        _count(state, kept, +1)
        for lender in kept.lenders:
            state.borrowed.setdefault(lender, set()).add(kept.job)


def unkeep(state: MeshState, job: JobId) -> None:
    """Take a result out of the index: it was deleted, or its time is up."""
    kept = state.kept.pop(job, None)
    if kept is None:
        return
    _count(state, kept, -1)
    for lender in kept.lenders:
        users = state.borrowed.get(lender, set())
        users.discard(job)
        if not users:
            state.borrowed.pop(lender, None)


def borrowers(state: MeshState, job: JobId, now_ms: int) -> list[JobId]:
    """Return the kept results that use chunks of this one."""
    found = (state.kept.get(name) for name in state.borrowed.get(job, ()))
    return sorted(kept.job for kept in found if kept is not None and now_ms < kept.until_ms)


def _count(state: MeshState, kept: Kept, sign: int) -> None:
    size = sign * kept.stored_bytes
    state.kept_bytes[kept.owner] = state.kept_bytes.get(kept.owner, 0) + size
    state.kept_bytes_at[kept.site] = state.kept_bytes_at.get(kept.site, 0) + size
    if not state.kept_bytes[kept.owner]:
        del state.kept_bytes[kept.owner]
    if not state.kept_bytes_at[kept.site]:
        del state.kept_bytes_at[kept.site]


def drop_past(state: MeshState, now_ms: int) -> None:
    """Forget the kept results whose time is up; the broker has dropped them by age."""
    while state.expiring and state.expiring[0][0] <= now_ms:
        _, job = heapq.heappop(state.expiring)
        kept = state.kept.get(job)
        if kept is not None and kept.until_ms <= now_ms:
            unkeep(state, job)


def charge_s(state: MeshState, job: JobRecord) -> float:
    """Return what a grant of the job is charged: the model's usual run time in seconds, or a guess before the first."""
    return max(0.05, state.run_ms.get(job.order.model.repo_id, 2000.0) / 1000)


def _enter_queue(state: MeshState, job: JobRecord) -> None:
    key = queue_key(job)
    insort(state.queue, key)
    if not any((rank, job.owner) in state.lines for rank in (0, 1)):  # a newcomer brings no savings along
        state.served_s[job.owner] = max(state.served_s.get(job.owner, 0.0), state.served_now_s)
    insort(state.lines.setdefault((key[0], job.owner), []), key)


def _leave_queue(state: MeshState, job: JobRecord) -> None:
    key = queue_key(job)
    line = state.lines.get((key[0], job.owner), [])
    for keys in (state.queue, line):
        place = bisect_left(keys, key)
        if place < len(keys) and keys[place] == key:
            del keys[place]
    if not line:
        state.lines.pop((key[0], job.owner), None)


def _put_attempt(state: MeshState, record: AttemptRecord) -> None:
    key = (record.job, record.attempt)
    if key not in state.attempts and record.job in state.jobs:
        job = state.jobs[record.job]
        state.served_now_s = max(state.served_now_s, state.served_s.get(job.owner, 0.0))
        state.served_s[job.owner] = state.served_s.get(job.owner, 0.0) + charge_s(state, job)
    state.attempts[key] = record
    here = state.active_at.setdefault(record.site, set())
    if record.active:
        state.active[key] = None
        here.add(key)
    else:
        state.active.pop(key, None)
        here.discard(key)
    if record.status is AttemptStatus.SUCCEEDED and record.receipt is not None and record.job in state.jobs:
        model = state.jobs[record.job].order.model.repo_id
        before = state.run_ms.get(model, float(record.receipt.wall_ms))
        state.run_ms[model] = 0.8 * before + 0.2 * record.receipt.wall_ms
