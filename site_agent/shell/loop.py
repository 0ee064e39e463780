"""The single-writer loop: decide, record, evolve, act. Every event of the agent passes here, one at a time.

Two things need not wait for the disk. A runner may begin: until its acceptance is recorded nothing of it leaves the
process. And a report of progress may leave; a last word waits, because the next life of the agent must not contradict it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from edif_mesh.domain.job import Failure
from site_agent.core.changes import Audited, Durable, ReportSettled, evolve
from site_agent.core.decision import decide
from site_agent.core.effects import Decision, Effect, SendReport, StartAttempt
from site_agent.core.events import BadOrderReceived, Event, GrantReceived, ReportAcknowledged, Ticked
from site_agent.core.state import Now, State
from site_agent.journal import Journal, JournalError

log = logging.getLogger(__name__)

_AUDITS_A_SECOND = 10
"""Of refusals that change nothing: whoever replays old bundles must not be able to fill the disk."""


def read_clocks() -> Now:
    """Return the time of both clocks."""
    return Now(time.time_ns() // 1_000_000, time.monotonic_ns() // 1_000_000)


class AgentLoop:
    """Holds the state; `act` carries out one effect at once (it may start tasks, and must not block or raise)."""

    def __init__(self, state: State, journal: Journal, act: Callable[[Effect], None]) -> None:
        self.state = state
        self.prepare: Callable[[StartAttempt], None] = lambda effect: None
        """Called before the record is on the disk: what costs nothing to undo may begin."""
        self.withdraw: Callable[[StartAttempt], None] = lambda effect: None
        """Undoes `prepare` when the record could not be written."""
        self._journal, self._act = journal, act
        self._turn = asyncio.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._audits = (0, 0)
        self._later: list[Durable] = []
        """Settled reports, written with whatever comes next: one that is lost here is only reported once more."""

    async def handle(self, event: Event) -> Failure | None:
        """Take one event through the core. Returns the refusal for whoever asked, or None.

        When the journal cannot be written, a grant is refused and nothing has happened; everything else still takes
        effect in memory, because an ended attempt has ended whether or not the disk is full.
        """
        async with self._turn:
            now = read_clocks()
            decision = decide(event, self.state, now)
            needs_record = isinstance(event, GrantReceived | BadOrderReceived)
            starting = [effect for effect in decision.act if isinstance(effect, StartAttempt)]
            progress = [e for e in decision.act if isinstance(e, SendReport) and not e.report.status.terminal]
            early = [] if needs_record else progress
            for report in early:
                self._act(report)
            for start in starting:
                self.prepare(start)
            failure = await self._record(event, decision, now)
            if failure is not None and needs_record:
                for start in starting:
                    self.withdraw(start)
                return failure
            for change in decision.record:
                evolve(self.state, change)
            for effect in decision.act:
                if effect not in early:
                    self._act(effect)
            return decision.refusal

    def close(self) -> None:
        """End the writer thread; no event may follow."""
        with contextlib.suppress(JournalError):
            self._journal.commit(self._later, read_clocks().wall_ms)
        self._writer.shutdown()

    async def _record(self, event: Event, decision: Decision, now: Now) -> Failure | None:
        durable = [change for change in decision.record if isinstance(change, Durable)]
        if isinstance(event, ReportAcknowledged) and all(isinstance(change, ReportSettled) for change in durable):
            self._later += durable
            return None
        if durable and all(isinstance(change, Audited) for change in durable) and not self._may_audit(now):
            return None
        if not durable and not (self._later and isinstance(event, Ticked)):
            return None
        durable = [*self._later, *durable]
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._writer, self._journal.commit, durable, now.wall_ms)
        except JournalError as error:
            log.error("journal failed", extra={"text": str(error)})
            self.state.trouble = str(error)
            return Failure(error.code, str(error))
        self._later.clear()
        self.state.trouble = ""
        return None

    def _may_audit(self, now: Now) -> bool:
        second, count = self._audits
        count = count + 1 if second == now.monotonic_ms // 1_000 else 1
        self._audits = (now.monotonic_ms // 1_000, count)
        return count <= _AUDITS_A_SECOND
