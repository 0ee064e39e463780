"""Reports on their way: each is repeated, in order for its attempt, until the coordinator says it has recorded it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from dataclasses import replace

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.errors import EdifError, TransportError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import TrustStore
from edif_mesh.transport.ports import Bus
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import open_envelope, seal
from edif_mesh.wire.messages import Report, ReportReceived
from site_agent.core.events import ReportAcknowledged
from site_agent.core.state import AttemptKey
from site_agent.shell.loop import AgentLoop, read_clocks

log = logging.getLogger(__name__)

_TIMEOUT_MS = 3_000
_FIRST_WAIT_S, _MAX_WAIT_S = 0.1, 5.0
_SHORT_S = 0.025
"""An attempt that ends within this time reports only its end: that it ran would be old when it is heard."""


class Outbox:
    """One task an attempt that has something to say."""

    def __init__(self, loop: AgentLoop, trust: TrustStore, key: PrivateKey, bus: Bus) -> None:
        self._loop, self._trust, self._key, self._bus = loop, trust, key, bus
        self._waiting: dict[AttemptKey, deque[Report]] = {}
        self._last_word: dict[AttemptKey, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._link = asyncio.Event()
        self.idle = asyncio.Event()
        """Set while nothing waits."""
        self.idle.set()

    def put(self, report: Report) -> None:
        """Send `report` after those of its attempt that still wait; a last word makes earlier ones needless."""
        key = (report.job, report.attempt)
        queue = self._waiting.get(key)
        if queue is not None:
            if report.status.terminal:
                queue.clear()
                self._last_word[key].set()
            queue.append(report)
            return
        self._waiting[key] = deque([report])
        self._last_word[key] = asyncio.Event()
        self.idle.clear()
        task = asyncio.create_task(self._deliver(key), name=f"report {key[0]}.{key[1]}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def link_returned(self) -> None:
        """The broker is back: everything that backs off tries again at once."""
        self._link.set()
        self._link = asyncio.Event()

    async def close(self) -> None:
        """Stop sending; what waits is in the journal."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _deliver(self, key: AttemptKey) -> None:
        queue, wait_s = self._waiting[key], _FIRST_WAIT_S
        if queue[0].status is AttemptStatus.RUNNING:
            await _until(self._last_word[key], _SHORT_S)
        while queue:
            report, link = queue[0], self._link
            try:
                acknowledged = await self._send(report)
            except TransportError:
                acknowledged = None
            except EdifError as error:
                log.warning("an answer to a report was not believed", extra={"job": key[0], "text": str(error)})
                acknowledged = None
            if acknowledged is None:
                await _until(link, wait_s * random.uniform(0.8, 1.2))
                wait_s = min(wait_s * 2, _MAX_WAIT_S)
                continue
            await self._loop.handle(ReportAcknowledged(acknowledged))
            wait_s = _FIRST_WAIT_S
            if queue and queue[0] is report:
                queue.popleft()
        del self._waiting[key], self._last_word[key]
        if not self._waiting:
            self.idle.set()

    async def _send(self, report: Report) -> ReportReceived | None:
        """Send once, stamped with the present time (the receiver may demand a fresh one); None for another's answer."""
        now_ms = read_clocks().wall_ms
        envelope = seal(replace(report, issued_at_ms=now_ms), self._key)
        raw = await self._bus.request(subjects.report(report.site), envelope.encode(), timeout_ms=_TIMEOUT_MS)
        answer = open_envelope(raw, ReportReceived, self._trust, read_clocks().wall_ms).message
        same = (answer.site, answer.job, answer.attempt) == (report.site, report.job, report.attempt)
        return answer if same and answer.sequence >= report.sequence else None


async def _until(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
