"""The single writer: takes events in order, decides, records in one transaction, and only then sends.

Events that wait together share a transaction. While the record cannot be written, nothing that would need it is
answered as done: orders stay at the broker, reports stay in the sites' journals, questions get a sentence; what needs
no record (renewed leases above all) goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from coordinator.core.decide import decide
from coordinator.core.decision import Decision, Send
from coordinator.core.events import Event
from coordinator.core.evolve import evolve
from coordinator.core.state import State
from coordinator.monitoring.metrics import Metrics
from coordinator.shell.recording import Changed, recording_of
from coordinator.storage.errors import RecordError
from coordinator.storage.recording import Recording
from coordinator.storage.store import Store
from edif_mesh.domain.job import Failure

log = logging.getLogger(__name__)

MAX_WAITING = 4_096
"""Events that may wait; beyond that the senders of durable messages wait too and others are dropped."""
MAX_BATCH = 64
RETRY_S = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Pauses between tries of a recording that failed; the last one repeats."""


@dataclass(frozen=True, slots=True)
class Settled:
    """How an arrival ended: `failure` is None when it was decided and, where needed, recorded."""

    sends: tuple[Send, ...]
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """One event and who wants to know that it is settled; `settled` must not block."""

    event: Event
    settled: Callable[[Settled], None]


class Sender(Protocol):
    """Where sends go once their cause is recorded."""

    def send(self, sends: Sequence[Send]) -> None:
        """Start to send; never blocks."""


class Loop:
    """Owns the state; everything that changes it comes through `put`."""

    def __init__(self, state: State, store: Store, sender: Sender, metrics: Metrics, now_ms: Callable[[], int]) -> None:
        self.state = state
        self.moved_at = time.monotonic()
        self.changes = 0
        """Rises with every recorded change and every advert."""
        self.failing: str | None = None
        """Why the record cannot be written now, or None."""
        self._store, self._sender, self._metrics, self._now_ms = store, sender, metrics, now_ms
        self._queue: asyncio.Queue[Arrival] = asyncio.Queue(MAX_WAITING)
        self._writer = ThreadPoolExecutor(1, "record")

    @property
    def waiting(self) -> int:
        """How many events wait."""
        return self._queue.qsize()

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
        """Let the last transaction end."""
        self._writer.shutdown(wait=True)

    async def _take(self, batch: list[Arrival]) -> None:
        self.moved_at = time.monotonic()
        decided: list[tuple[Arrival, tuple[Send, ...]]] = []
        changed = Changed()
        for arrival in batch:
            decision = self._decide(arrival)
            if decision is None:
                continue
            self._evolve(decision, changed)
            decided.append((arrival, decision.send))
        if changed:
            await self._record(recording_of(changed, self.state, self._now_ms()))
        for arrival, sends in decided:
            arrival.settled(Settled(sends))
            self._sender.send(sends)
        self.changes += 1

    def _decide(self, arrival: Arrival) -> Decision | None:
        """Decide one event; a rule that breaks on it costs this event only, for nothing has changed yet."""
        began = time.perf_counter()
        try:
            decision = decide(arrival.event, self.state, self._now_ms())
        except Exception:
            log.exception("event not decided", extra={"kind": type(arrival.event).__name__})
            arrival.settled(Settled((), Failure("internal", "The coordinator failed on this message; it is logged there.")))
            return None
        self._metrics.decision_seconds.observe(time.perf_counter() - began)
        self._metrics.events.labels(type(arrival.event).__name__).inc()
        return decision

    def _evolve(self, decision: Decision, changed: Changed) -> None:
        for change in decision.record:
            evolve(self.state, change)
            changed.add(change)
            self._count(change)

    async def _record(self, recording: Recording) -> None:
        """Write `recording`, trying until it works; meanwhile serve what needs no record."""
        loop, tries = asyncio.get_running_loop(), 0
        while True:
            began = time.perf_counter()
            try:
                await loop.run_in_executor(self._writer, self._store.apply, recording)
            except RecordError as error:
                self._metrics.record_failures.inc()
                if self.failing is None:
                    log.error("record not written", extra={"reason": str(error)})
                self.failing = str(error)
                await self._serve_unrecorded(RETRY_S[min(tries, len(RETRY_S) - 1)])
                tries += 1
                continue
            self._metrics.commit_seconds.observe(time.perf_counter() - began)
            if self.failing is not None:
                log.warning("record written again", extra={"tries": tries + 1})
                self.failing = None
            return

    async def _serve_unrecorded(self, seconds: float) -> None:
        """For `seconds`, answer what needs no record and turn away what does."""
        failure = Failure("record", self.failing or "")
        with_deadline = asyncio.timeout(seconds)
        try:
            async with with_deadline:
                while True:
                    arrival = await self._queue.get()
                    self.moved_at = time.monotonic()
                    decision = self._decide(arrival)
                    if decision is None:
                        continue
                    if decision.record:
                        arrival.settled(Settled((), failure))
                    else:
                        arrival.settled(Settled(decision.send))
        except TimeoutError:
            self.moved_at = time.monotonic()
