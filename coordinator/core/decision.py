"""What a decision is: changes to record, then messages to send. `Draft` is the notebook that the rules write into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.core.state import (
    AttemptChanged,
    AttemptKey,
    AttemptRecord,
    Audited,
    Change,
    JobChanged,
    JobRecord,
    MeshState,
    SiteChanged,
    SiteRecord,
    TermChanged,
)
from edif_mesh.domain.attempt import ATTEMPT_TRANSITIONS
from edif_mesh.domain.ids import Epoch, JobId, SiteId
from edif_mesh.domain.job import JOB_TRANSITIONS, JobStatus
from edif_mesh.wire.messages import (
    Grant,
    JobList,
    JobSnapshot,
    LeaseRenewed,
    MeshView,
    Refusal,
    ReportReceived,
    StopAttempt,
)

Answer = LeaseRenewed | ReportReceived | JobSnapshot | JobList | MeshView | Refusal


@dataclass(frozen=True, slots=True)
class SendGrant:
    """Sign the grant and send it with the order's envelope to its site."""

    grant: Grant
    order: str


@dataclass(frozen=True, slots=True)
class SendStop:
    """Sign and send."""

    stop: StopAttempt


@dataclass(frozen=True, slots=True)
class Reply:
    """Sign and answer whoever waits at `reply_to`."""

    reply_to: str
    message: Answer


@dataclass(frozen=True, slots=True)
class PublishJob:
    """Publish the job's new snapshot; the shell makes it (`snapshot.py`) after the record was kept."""

    job: JobId


@dataclass(frozen=True, slots=True)
class PublishRefusal:
    """Tell the researcher who watches `job` that the order was not accepted; nothing was recorded of it."""

    job: JobId
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class PurgePayload:
    """The job has ended: its payload may go, and what attempts have stored that did not become its result."""

    job: JobId


@dataclass(frozen=True, slots=True)
class PurgeJob:
    """Delete all that the broker holds of a job; `JobPurged` follows when it is done."""

    job: JobId


Outgoing = SendGrant | SendStop | Reply | PublishJob | PublishRefusal | PurgePayload | PurgeJob


@dataclass(frozen=True, slots=True)
class Decision:
    """First `record` all of it in one transaction, then `send`."""

    record: tuple[Change, ...] = ()
    send: tuple[Outgoing, ...] = ()


class BrokenRuleError(AssertionError):
    """A rule tried a transition that the tables forbid: a defect of the core."""


@dataclass
class Draft:
    """The state as it will be once this decision is recorded. Reads fall through to the state; nothing is changed there."""

    state: MeshState
    now_ms: int
    _jobs: dict[JobId, JobRecord] = field(default_factory=dict)
    _attempts: dict[AttemptKey, AttemptRecord] = field(default_factory=dict)
    _sites: dict[SiteId, tuple[SiteRecord, bool]] = field(default_factory=dict)
    _audit: list[Audited] = field(default_factory=list)
    _send: list[Outgoing] = field(default_factory=list)
    epoch: Epoch | None = None

    def job(self, job: JobId) -> JobRecord | None:
        """Return the job's newest record."""
        return self._jobs.get(job) or self.state.jobs.get(job)

    def attempt(self, key: AttemptKey) -> AttemptRecord | None:
        """Return the attempt's newest record."""
        return self._attempts.get(key) or self.state.attempts.get(key)

    def current_attempt(self, job: JobRecord) -> AttemptRecord | None:
        """Return the record of the job's newest attempt."""
        return self.attempt((job.job, job.attempt))

    def site(self, site: SiteId) -> SiteRecord | None:
        """Return the site's newest record."""
        found = self._sites.get(site)
        return found[0] if found else self.state.sites.get(site)

    def sites(self) -> Iterator[SiteRecord]:
        """Yield all sites' newest records."""
        for site in {**self.state.sites, **self._sites}:
            record = self.site(site)
            assert record is not None
            yield record

    def active_at(self, site: SiteId) -> list[AttemptRecord]:
        """Return the attempts that may still run at `site`."""
        keys = set(self.state.active_at.get(site, ())) | {k for k, a in self._attempts.items() if a.site == site}
        found = [self.attempt(key) for key in keys]
        return sorted(
            (a for a in found if a is not None and a.active), key=lambda a: (a.granted_at_ms, a.job, a.attempt)
        )

    def changed_jobs(self) -> list[JobRecord]:
        """Return the jobs that this decision has changed so far."""
        return list(self._jobs.values())

    def change_job(self, job: JobRecord, **fields: Any) -> JobRecord:
        """Write a job's new record (version raised, published once); a forbidden transition raises BrokenRuleError."""
        before = self.job(job.job)
        new = replace(job, version=job.version + 1, updated_at_ms=self.now_ms, **fields)
        if before is not None and new.status is not before.status:
            if new.status not in JOB_TRANSITIONS[before.status]:
                raise BrokenRuleError(f"{job.job}: {before.status} -> {new.status}")
            self.audit(f"job {new.status.value.lower()}", job=new, text=new.text)
        if new.status.terminal and (before is None or not before.terminal):
            self._send.append(PurgePayload(job.job))
        self._jobs[job.job] = new
        if not any(isinstance(item, PublishJob) and item.job == job.job for item in self._send):
            self._send.append(PublishJob(job.job))
        return new

    def add_job(self, job: JobRecord) -> JobRecord:
        """Write a new job's first record."""
        self._jobs[job.job] = job
        self.audit("job queued", job=job, text=job.text)
        self._send.append(PublishJob(job.job))
        return job

    def change_attempt(self, attempt: AttemptRecord, **fields: Any) -> AttemptRecord:
        """Write an attempt's new record; a forbidden transition raises BrokenRuleError."""
        key = (attempt.job, attempt.attempt)
        before = self.attempt(key)
        new = replace(attempt, **fields)
        if before is None or new.status is not before.status:
            if before is not None and new.status not in ATTEMPT_TRANSITIONS[before.status]:
                raise BrokenRuleError(f"{key}: {before.status} -> {new.status}")
            text = new.failure.line if new.failure else new.detail
            self._audit.append(
                Audited(self.now_ms, f"attempt {new.status.value.lower()}", new.job, new.attempt, new.site, text[:300])
            )
        self._attempts[key] = new
        return new

    def change_site(self, site: SiteRecord, *, durable: bool = True) -> SiteRecord:
        """Write a site's new record."""
        before = self.site(site.site)
        if before is None or before.status is not site.status:
            self._audit.append(Audited(self.now_ms, f"site {site.status.value.lower()}", site=site.site))
            durable = True
        was = self._sites.get(site.site)
        self._sites[site.site] = (site, durable or (was is not None and was[1]))
        return site

    def audit(self, what: str, *, job: JobRecord, text: str = "") -> None:
        """Add one line to the audit log."""
        site = job.result_site if job.status is JobStatus.SUCCEEDED else None
        self._audit.append(Audited(self.now_ms, what, job.job, job.attempt or None, site, text[:300]))

    def send(self, outgoing: Outgoing) -> None:
        """Send this once everything is recorded."""
        self._send.append(outgoing)

    def decision(self) -> Decision:
        """Return what was written."""
        record: list[Change] = []
        if self.epoch is not None:
            record.append(TermChanged(self.epoch))
        record += [JobChanged(job) for job in self._jobs.values()]
        record += [AttemptChanged(attempt) for attempt in self._attempts.values()]
        record += [SiteChanged(site, durable) for site, durable in self._sites.values()]
        record += self._audit
        return Decision(tuple(record), tuple(self._send))
