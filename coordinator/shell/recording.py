"""The core's records <-> what storage keeps. An order's envelope is kept once, in a table of its own."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from coordinator.core.state import (
    AttemptChanged,
    AttemptKey,
    AttemptRecord,
    Audited,
    Change,
    JobChanged,
    JobRecord,
    SiteChanged,
    SiteRecord,
    TermChanged,
)
from coordinator.storage.recording import AuditLine, Recording, StoredAttempt, StoredJob, StoredOrder, StoredSite
from edif_mesh.domain.ids import Epoch, JobId, SiteId

_JOB: TypeAdapter[JobRecord] = TypeAdapter(JobRecord)
_ATTEMPT: TypeAdapter[AttemptRecord] = TypeAdapter(AttemptRecord)
_SITE: TypeAdapter[SiteRecord] = TypeAdapter(SiteRecord)


@dataclass
class Changed:
    """What is to be written: the last record of each key, and every line of the audit log."""

    jobs: dict[JobId, JobRecord] = field(default_factory=dict)
    attempts: dict[AttemptKey, AttemptRecord] = field(default_factory=dict)
    sites: dict[SiteId, tuple[SiteRecord, bool]] = field(default_factory=dict)
    orders: dict[JobId, JobRecord] = field(default_factory=dict)
    audit: list[Audited] = field(default_factory=list)

    @property
    def durable(self) -> bool:
        """Whether there is anything that storage must keep."""
        return bool(self.jobs or self.attempts or self.audit or any(keep for _, keep in self.sites.values()))

    def add(self, changes: Iterable[Change], known: Container[JobId]) -> None:
        """Take the changes of one decision, before they are applied; `known` are the jobs whose orders are recorded."""
        for change in changes:
            match change:
                case JobChanged(job):
                    self.jobs[job.job] = job
                    if job.job not in known:
                        self.orders[job.job] = job
                case AttemptChanged(attempt):
                    self.attempts[attempt.job, attempt.attempt] = attempt
                case SiteChanged(site, durable):
                    _, before = self.sites.get(site.site, (site, False))
                    self.sites[site.site] = (site, durable or before)
                case Audited():
                    self.audit.append(change)
                case TermChanged():
                    pass  # the term was begun in storage before

    def recording(self, epoch: Epoch) -> Recording:
        """Return the transaction that writes all of it."""
        return Recording(
            epoch=epoch,
            jobs=tuple(_stored_job(job) for job in self.jobs.values()),
            attempts=tuple(_stored_attempt(attempt) for attempt in self.attempts.values()),
            orders=tuple(StoredOrder(job.job, job.order_digest, job.order_envelope) for job in self.orders.values()),
            sites=tuple(
                StoredSite(site.site, _SITE.dump_json(site).decode())
                for site, durable in self.sites.values()
                if durable
            ),
            audit=tuple(
                AuditLine(line.at_ms, line.what, line.text, line.job, line.attempt, line.site) for line in self.audit
            ),
        )


def job_of(stored: StoredJob, envelope: str) -> JobRecord:
    """Return the job as it was recorded, with its order's envelope."""
    return replace(_JOB.validate_json(stored.record), order_envelope=envelope)


def attempt_of(stored: StoredAttempt) -> AttemptRecord:
    """Return the attempt as it was recorded."""
    return _ATTEMPT.validate_json(stored.record)


def site_of(stored: StoredSite) -> SiteRecord:
    """Return the site as it was recorded."""
    return _SITE.validate_json(stored.record)


def _stored_job(job: JobRecord) -> StoredJob:
    return StoredJob(
        job=job.job,
        version=job.version,
        status=job.status.value,
        terminal=job.terminal,
        owner=job.owner,
        model=job.order.model.repo_id[:200],
        submitted_at_ms=job.submitted_at_ms,
        updated_at_ms=job.updated_at_ms,
        record=_dump(_JOB, replace(job, order_envelope="")),
    )


def _stored_attempt(attempt: AttemptRecord) -> StoredAttempt:
    return StoredAttempt(
        job=attempt.job,
        attempt=attempt.attempt,
        site=attempt.site,
        status=attempt.status.value,
        active=attempt.active,
        granted_at_ms=attempt.granted_at_ms,
        record=_dump(_ATTEMPT, attempt),
    )


def _dump(adapter: TypeAdapter[Any], value: object) -> str:
    return adapter.dump_json(value).decode()
