"""What monitoring may ask of the coordinator: reads only, and nothing here waits for the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edif_mesh.domain.ids import JobId
from edif_mesh.domain.job import JobStatus
from edif_mesh.wire.messages import JobSnapshot, MeshView


@dataclass(frozen=True, slots=True)
class Event:
    """One recorded change, for the event log."""

    number: int
    at_ms: int
    what: str
    job: str | None
    attempt: int | None
    site: str | None
    epoch: int
    text: str


@dataclass(frozen=True, slots=True)
class Health:
    """How the coordinator is. `reasons` are sentences; empty means ready."""

    recovered: bool
    connected: bool
    writable: bool
    loop_moved_ms_ago: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is counted at the moment of a scrape."""

    epoch: int
    jobs_by_status: dict[str, int]
    queue_by_model: dict[str, int]
    sites_by_status: dict[str, int]
    inbox_waiting: int


class MeshReader(Protocol):
    """The coordinator's state, read from the same event loop, and its record, read in a thread."""

    @property
    def changes(self) -> int:
        """Rises whenever something that the page shows may have changed."""

    def mesh(self) -> MeshView:
        """Return all sites and totals as they are now."""

    def queue(self) -> dict[str, int]:
        """Return how many jobs wait, by model."""

    def gauges(self) -> Gauges:
        """Return what `/metrics` shows."""

    def health(self) -> Health:
        """Return whether the coordinator is alive and ready."""

    async def jobs(self, *, status: JobStatus | None, limit: int, offset: int) -> Sequence[JobSnapshot]:
        """Return jobs, newest first, without manifests."""

    async def job(self, job: JobId, *, explain: bool) -> JobSnapshot | None:
        """Return one job, or None; with `explain`, also the verdict on every site."""

    async def events(self, *, before: int | None, job: JobId | None, limit: int) -> Sequence[Event]:
        """Return recorded changes, newest first."""
