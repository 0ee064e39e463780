"""What one transaction writes: plain values, made by the shell from the core's decisions."""

from __future__ import annotations

from dataclasses import dataclass

from edif_mesh.domain.ids import AttemptNumber, Digest, Epoch, JobId, KeyId, SiteId


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job to insert or replace; `version` must be newer than the stored one. `record` is the core's value as JSON."""

    job: JobId
    version: int
    status: str
    terminal: bool
    owner: KeyId
    model: str
    submitted_at_ms: int
    updated_at_ms: int
    record: str


@dataclass(frozen=True, slots=True)
class StoredAttempt:
    """An attempt to insert or replace; `active` means that it may still run, or has still to be stopped."""

    job: JobId
    attempt: AttemptNumber
    site: SiteId
    status: str
    active: bool
    granted_at_ms: int
    record: str


@dataclass(frozen=True, slots=True)
class StoredOrder:
    """An order's exact envelope; one that is there already stays as it is."""

    job: JobId
    digest: Digest
    envelope: str


@dataclass(frozen=True, slots=True)
class StoredSite:
    """A site to insert or replace."""

    site: SiteId
    record: str


@dataclass(frozen=True, slots=True)
class AuditLine:
    """One line of the audit log; `number` and `epoch` are set when it is written."""

    at_ms: int
    what: str
    text: str = ""
    job: JobId | None = None
    attempt: AttemptNumber | None = None
    site: SiteId | None = None
    epoch: Epoch = Epoch(0)
    number: int = 0


@dataclass(frozen=True, slots=True)
class Recording:
    """All that one transaction writes, for the coordinator of `epoch`."""

    epoch: Epoch
    jobs: tuple[StoredJob, ...] = ()
    attempts: tuple[StoredAttempt, ...] = ()
    orders: tuple[StoredOrder, ...] = ()
    sites: tuple[StoredSite, ...] = ()
    audit: tuple[AuditLine, ...] = ()
