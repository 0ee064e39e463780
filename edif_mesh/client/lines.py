"""What a job prints, line by line, in order and once: live by subscription, gaps filled from the stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.errors import EdifError, NotConnectedError, TransportError
from edif_mesh.transport.ports import Incoming, Subscription
from edif_mesh.wire import subjects
from edif_mesh.wire.messages import LogLines

if TYPE_CHECKING:
    from edif_mesh.client.mesh import Mesh

log = logging.getLogger(__name__)
_FILL_TIMEOUT_S = 10.0


class LineFollower:
    """Calls `on_line` for every line that a job prints; `finish` gives those that a lost link held back."""

    def __init__(self, mesh: Mesh, job: JobId, on_line: Callable[[str], object]) -> None:
        self._mesh, self._job, self._on_line = mesh, job, on_line
        self._next: dict[AttemptNumber, int] = {}
        self._subscription: Subscription | None = None
        self._losses = mesh.link_losses

    async def start(self, *, before_it_runs: bool = False) -> None:
        """Listen from now on; `finish` reads what may have been missed.

        Nothing can be when the order leaves over this very connection afterwards: then `before_it_runs`.
        """
        if not before_it_runs:
            self._losses -= 1
        try:
            subject = subjects.all_log_lines(self._job)
            self._subscription = await self._mesh.bus.subscribe(subject, self._received)
        except NotConnectedError:
            self._losses -= 1

    async def finish(self) -> None:
        """Give what a lost link held back, and stop. Idempotent."""
        if self._losses != self._mesh.link_losses:
            self._losses = self._mesh.link_losses
            await self.fill()
        await self.close()

    async def close(self) -> None:
        """Stop listening."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.close()

    async def _received(self, incoming: Incoming) -> None:
        message = open_lines(self._mesh, self._job, incoming.data)
        if message is None:
            return
        if message.first > self._next.get(message.attempt, 0):
            await self.fill()
        self._give(message)

    async def fill(self) -> None:
        """Give what the stream holds and was not given yet; best effort."""
        with contextlib.suppress(TransportError, TimeoutError):
            async with asyncio.timeout(_FILL_TIMEOUT_S):
                async for message in stored_lines(self._mesh, self._job):
                    self._give(message)

    def _give(self, message: LogLines) -> None:
        expected = self._next.get(message.attempt, 0)
        for line in message.lines[max(0, expected - message.first) :]:
            self._on_line(line)
        self._next[message.attempt] = max(expected, message.first + len(message.lines))


async def stored_lines(mesh: Mesh, job: JobId) -> AsyncIterator[LogLines]:
    """Yield what the stream holds of a job's lines at this moment; raises TransportError."""
    subject = subjects.all_log_lines(job)
    left = sum((await mesh.streams.subjects(subjects.LOGS_STREAM, subject)).values())
    if left == 0:
        return
    reader = mesh.streams.read(subjects.LOGS_STREAM, subject)
    try:
        async for stored in reader:
            message = open_lines(mesh, job, stored.data)
            if message is not None:
                yield message
            left -= 1
            if left == 0:
                return
    finally:
        await reader.aclose()  # type: ignore[attr-defined]


def open_lines(mesh: Mesh, job: JobId, data: bytes) -> LogLines | None:
    """Return verified lines of this job, signed by the site that they name, or None."""
    try:
        opened = mesh.open(data, LogLines)
    except EdifError as error:
        log.warning("log lines refused", extra={"job": job, "error": str(error)})
        return None
    lines = opened.message
    return lines if lines.job == job and lines.site == opened.identity.name and lines.first >= 0 else None
