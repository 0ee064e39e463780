"""What monitoring reads: the state from memory (same event loop, so never half changed), the history from the record."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from coordinator.core.decision import Draft
from coordinator.core.snapshot import mesh_view, snapshot
from coordinator.core.state import MeshState, evolve
from coordinator.monitoring.reader import Event, Gauges, Health
from coordinator.shell.loop import Loop
from coordinator.shell.recovery import History, recall
from coordinator.storage.errors import RecordError
from coordinator.storage.recording import AuditLine
from coordinator.storage.store import Store
from edif_mesh.domain.ids import JobId
from edif_mesh.domain.job import JobStatus
from edif_mesh.transport.ports import Bus
from edif_mesh.wire.messages import JobSnapshot, MeshView

STILL_MS = 5_000


class Reading:
    """Implements `monitoring.reader.MeshReader`."""

    def __init__(self, loop: Loop, store: Store, bus: Bus, now_ms: Callable[[], int]) -> None:
        self.recovered = False
        self._loop, self._store, self._bus, self._now_ms = loop, store, bus, now_ms

    @property
    def changes(self) -> int:
        """Rises whenever something that the page shows may have changed."""
        return self._loop.changes

    def mesh(self) -> MeshView:
        """Return all sites and totals as they are now."""
        return mesh_view(self._draft())

    def queue(self) -> dict[str, int]:
        """Return how many jobs wait, by model."""
        jobs = self._loop.state.jobs
        return dict(Counter(jobs[key[2]].order.model.repo_id for key in self._loop.state.queue))

    def gauges(self) -> Gauges:
        """Return what `/metrics` shows; ended jobs are those in memory."""
        state = self._loop.state
        jobs = {status.value: 0 for status in JobStatus}
        jobs |= Counter(job.status.value for job in state.jobs.values())
        sites = Counter(site.status.value for site in state.sites.values())
        return Gauges(state.epoch, jobs, self.queue(), dict(sites), self._loop.waiting)

    def health(self) -> Health:
        """Return whether the coordinator is alive and ready."""
        reasons = []
        if not self.recovered:
            reasons.append("The coordinator is still starting.")
        if not self._bus.connected:
            reasons.append("The broker is not connected; sites and researchers cannot be heard.")
        if self._loop.failing is not None:
            reasons.append(self._loop.failing)
        if self._loop.moved_ms_ago > STILL_MS:
            reasons.append(f"The loop has not moved for {self._loop.moved_ms_ago} ms.")
        writable = self._loop.failing is None
        return Health(self.recovered, self._bus.connected, writable, self._loop.moved_ms_ago, tuple(reasons))

    async def jobs(self, *, status: JobStatus | None, limit: int, offset: int) -> Sequence[JobSnapshot]:
        """Return jobs, newest first; empty while the record cannot be read."""
        wanted = None if status is None else status.value
        try:
            found = await asyncio.to_thread(self._store.jobs, status=wanted, limit=limit, offset=offset)
        except RecordError:
            return ()
        shown = [await self.job(stored.job, explain=False) for stored in found]
        return [replace(job, manifest=None) for job in shown if job is not None]

    async def job(self, job: JobId, *, explain: bool) -> JobSnapshot | None:
        """Return one job, from memory or from the record, or None."""
        record = self._loop.state.jobs.get(job)
        if record is not None:
            return snapshot(self._draft(), record, explain=explain)
        try:
            history = await asyncio.to_thread(recall, self._store, job)
        except RecordError:
            return None
        return self._from_history(job, history, explain=explain)

    async def events(self, *, before: int | None, job: JobId | None, limit: int) -> Sequence[Event]:
        """Return recorded changes, newest first; empty while the record cannot be read."""
        try:
            lines = await asyncio.to_thread(self._store.audit, before=before, job=job, limit=limit)
        except RecordError:
            return ()
        return [_event(line) for line in lines]

    def _from_history(self, job: JobId, history: History, *, explain: bool) -> JobSnapshot | None:
        aside = MeshState(self._loop.state.federation, self._loop.state.policy, self._loop.state.epoch)
        for change in history:
            evolve(aside, change)
        record = aside.jobs.get(job)
        return None if record is None else snapshot(Draft(aside, self._now_ms()), record, explain=explain)

    def _draft(self) -> Draft:
        return Draft(self._loop.state, self._now_ms())


def _event(line: AuditLine) -> Event:
    return Event(line.number, line.at_ms, line.what, line.job, line.attempt, line.site, line.epoch, line.text)
