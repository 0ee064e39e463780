"""The single writer: takes events in order, decides, records in one transaction, and only then sends.

Events that wait together share a transaction. While the record cannot be written nothing that needs it is taken on:
orders stay at the broker, reports stay in the sites' journals, questions about jobs get a sentence. Adverts are still
heard and leases renewed, since a lease that is renewed and not recorded harms nobody: a new term renews them all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from coordinator.core.decide import apply, decide
from coordinator.core.decision import Decision, Outgoing, Reply
from coordinator.core.events import (
    AdvertReceived,
    Event,
    GrantAnswered,
    LinkLost,
    LinkReturned,
    MeshAsked,
    SiteDisconnected,
    Ticked,
)
from coordinator.core.state import AttemptChanged, Change, JobChanged, MeshState, SiteChanged, evolve, forget_job
from coordinator.monitoring.metrics import Metrics
from coordinator.shell.recording import Changed
from coordinator.shell.recovery import ENDED_IN_MEMORY, History
from coordinator.storage.errors import RecordError
from coordinator.storage.store import Store
from edif_mesh.domain.ids import JobId
from edif_mesh.domain.job import Failure

log = logging.getLogger(__name__)

MAX_WAITING = 4_096
"""Events that may wait; beyond that, senders of durable messages wait too, and requests are dropped (and repeated)."""
MAX_BATCH = 64
RETRY_S = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Pauses between the tries of a recording that failed; the last one repeats."""
_HARMLESS = (AdvertReceived, GrantAnswered, LinkLost, LinkReturned, MeshAsked, SiteDisconnected)
"""What is taken on while the record cannot be written: none of it promises anything to a researcher."""

FLUSH_S = 1.0
"""How long a renewed lease or an answered grant may wait for the next transaction."""

Settled = Callable[[Failure | None], None]
"""Called once an event is decided and recorded, or with the reason why it was not taken on; must not block."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One event, who wants to know that it is settled, and what has to be back in memory first."""

    event: Event
    settled: Settled | None = None
    recalled: History | None = None


class Loop:
    """Owns the state; everything that changes it comes through the queue."""

    def __init__(
        self,
        state: MeshState,
        store: Store,
        metrics: Metrics,
        now_ms: Callable[[], int],
        send: Callable[[Sequence[Outgoing]], None],
    ) -> None:
        """`send` starts to send what is recorded by now; it must not block."""
        self.state = state
        self.changes = 0
        """Rises with every batch."""
        self.failing: str | None = None
        """Why the record cannot be written now."""
        self._moved_at = time.monotonic()
        self._store, self._metrics, self._now_ms, self._send = store, metrics, now_ms, send
        self._queue: asyncio.Queue[Arrival] = asyncio.Queue(MAX_WAITING)
        self._writer = ThreadPoolExecutor(1, "record")
        self._pending = Changed()
        """What is applied and not yet written; between batches only what `_may_wait`."""
        self._flushed_at = time.monotonic()
        self._ended = deque(job for job, record in state.jobs.items() if record.terminal)
        self.all_in_memory = len(self._ended) < ENDED_IN_MEMORY
        """Whether no job is in the record only."""

    @property
    def waiting(self) -> int:
        """How many events wait."""
        return self._queue.qsize()

    @property
    def moved_ms_ago(self) -> int:
        """When the loop last took something on; ticks come several times a second."""
        return int((time.monotonic() - self._moved_at) * 1000)

    async def put(self, arrival: Arrival) -> None:
        """Queue an event; waits while too many wait already."""
        await self._queue.put(arrival)

    def offer(self, arrival: Arrival) -> bool:
        """Queue an event, or return False when too many wait already."""
        try:
            self._queue.put_nowait(arrival)
        except asyncio.QueueFull:
            return False
        return True

    async def run(self) -> None:
        """Decide and record until cancelled; raises LostLeadershipError, or what a broken rule raised."""
        while True:
            batch = [await self._queue.get()]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._take(batch)

    def close(self) -> None:
        """Let the last transaction end. What may wait is not written: a new term finds it out again."""
        self._writer.shutdown(wait=True)

    async def _take(self, batch: Sequence[Arrival]) -> None:
        self._moved_at = time.monotonic()
        sends, settled, must_record = list[Outgoing](), list[Settled](), False
        for arrival in batch:
            decision = self._step(arrival)
            if decision is not None:
                must_record = must_record or not _may_wait(arrival.event, decision)
                sends += decision.send
                settled += [arrival.settled] if arrival.settled is not None else []
        if self._pending.durable and (must_record or self._moved_at - self._flushed_at >= FLUSH_S):
            sends += await self._record()
        for settle in settled:
            settle(None)
        self._send(sends)
        self._forget()
        self.changes += 1

    def _step(self, arrival: Arrival) -> Decision | None:
        """Decide one event and apply it; a rule that breaks costs this event only, for nothing has changed by then."""
        event, now_ms, began = arrival.event, self._now_ms(), time.perf_counter()
        self._bring_back(arrival.recalled)
        try:
            decision = decide(event, self.state, now_ms)
        except Exception:
            log.exception("event not decided", extra={"kind": type(event).__name__})
            if arrival.settled is not None:
                arrival.settled(
                    Failure("internal", "The coordinator failed on this message; the reason is in its log.")
                )
            return None
        self._count(event, decision.record)
        self._pending.add(decision.record, self.state.jobs)
        apply(self.state, event, decision.record, now_ms)
        self._metrics.decision_seconds.observe(time.perf_counter() - began)
        return decision

    async def _record(self) -> list[Outgoing]:
        """Write what is pending, trying until it works; returns what harmless events have asked to send meanwhile."""
        loop, held, tries = asyncio.get_running_loop(), list[Outgoing](), 0
        while True:
            began, recording = time.perf_counter(), self._pending.recording(self.state.epoch)
            try:
                await loop.run_in_executor(self._writer, self._store.apply, recording)
            except RecordError as error:
                self._metrics.record_failures.inc()
                if self.failing is None:
                    log.error("record not written", extra={"reason": str(error)})
                self.failing = str(error)
                held += await self._serve_harmless(RETRY_S[min(tries, len(RETRY_S) - 1)])
                tries += 1
                continue
            self._pending, self._flushed_at = Changed(), time.monotonic()
            self._metrics.commit_seconds.observe(time.perf_counter() - began)
            if self.failing is not None:
                log.warning("record written again", extra={"tries": tries + 1})
                self.failing = None
            return held

    async def _serve_harmless(self, seconds: float) -> list[Outgoing]:
        """For `seconds` take on what is harmless, into the same recording, and turn the rest away."""
        held: list[Outgoing] = []
        try:
            async with asyncio.timeout(seconds):
                while True:
                    arrival = await self._queue.get()
                    self._moved_at = time.monotonic()
                    if isinstance(arrival.event, _HARMLESS):
                        decision = self._step(arrival)
                        sends = decision.send if decision is not None else ()
                        self._send([item for item in sends if isinstance(item, Reply)])
                        held += [item for item in sends if not isinstance(item, Reply)]
                    elif arrival.settled is not None and not isinstance(arrival.event, Ticked):
                        arrival.settled(Failure("record", self.failing or "The record cannot be written now."))
        except TimeoutError:
            self._moved_at = time.monotonic()
        return held

    def _bring_back(self, history: History | None) -> None:
        for change in history or ():
            if isinstance(change, JobChanged):
                if change.record.job in self.state.jobs:
                    return  # it came back meanwhile, and may have changed since it was read
                self._ended.append(change.record.job)
            evolve(self.state, change)

    def _forget(self) -> None:
        """Keep only the jobs in memory that ended last; the record has the others."""
        for _ in range(len(self._ended) - ENDED_IN_MEMORY):
            self.all_in_memory = False
            job = self._ended.popleft()
            forget_job(self.state, job)
            if job in self.state.jobs:  # an attempt of it has still to be stopped
                self._ended.append(job)

    def _count(self, event: Event, record: Sequence[Change]) -> None:
        self._metrics.events.labels(type(event).__name__).inc()
        for change in record:
            match change:
                case JobChanged(job) if job.terminal and not self._was_terminal(job.job):
                    self._ended.append(job.job)
                    self._metrics.jobs_ended.labels(job.status.value).inc()
                case AttemptChanged(attempt) if attempt.status.terminal:
                    before = self.state.attempts.get((attempt.job, attempt.attempt))
                    if before is None or not before.status.terminal:
                        self._metrics.attempts.labels(attempt.status.value).inc()
                case _:
                    pass

    def _was_terminal(self, job: JobId) -> bool:
        before = self.state.jobs.get(job)
        return before is not None and before.terminal


def _may_wait(event: Event, decision: Decision) -> bool:
    """Whether nothing is lost when the process dies before this is written.

    So it is with a lease that is renewed (a new term renews them all), a mere sign of life, and the answer to a grant (a
    new term sends the grant again, and the site answers again). Whatever changes a status is recorded before it is told.
    """
    if not decision.record:
        return True
    if not isinstance(event, AdvertReceived | GrantAnswered):
        return False
    return all(
        isinstance(change, AttemptChanged) or (isinstance(change, SiteChanged) and not change.durable)
        for change in decision.record
    )
