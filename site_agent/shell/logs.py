"""What a runner prints, on its way to the researcher while the job runs: whole lines, in batches, signed."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from edif_mesh.domain.ids import SiteId
from edif_mesh.errors import StoreFullError, TransportError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.transport.ports import Streams
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import seal
from edif_mesh.wire.messages import LogLines
from site_agent.core.state import AttemptKey
from site_agent.shell.loop import read_clocks

log = logging.getLogger(__name__)

_GATHER_S = 0.05
_MAX_LINES, _MAX_CHARACTERS = 100, 64_000
_GIVE_UP_S, _ABANDON_S = 60.0, 0.5


class LogSender:
    """The lines of one attempt. The runner bounds how much there is (`log_bytes`), so waiting lines are bounded too."""

    def __init__(self, key: AttemptKey, site: SiteId, signer: PrivateKey, streams: Streams) -> None:
        self._key, self._site, self._signer, self._streams = key, site, signer, streams
        self._lines: list[str] = []
        self._partial = ""
        self._next = 0
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def add(self, text: str) -> None:
        """Take printed text; it leaves soon, up to its last line break."""
        *whole, self._partial = (self._partial + text).split("\n")
        while len(self._partial) > _MAX_CHARACTERS:
            whole.append(self._partial[:_MAX_CHARACTERS])
            self._partial = self._partial[_MAX_CHARACTERS:]
        self._lines += whole
        if self._lines and self._task is None:
            self._task = asyncio.create_task(self._send_all(), name=f"log {self._key[0]}")
        if len(self._lines) >= _MAX_LINES:
            self._wake.set()

    async def close(self) -> None:
        """Send what is left, an unfinished line too; gives up after a minute without a broker."""
        if self._partial:
            self.add("\n")
        self._closing = True
        self._wake.set()
        if self._task is not None:
            try:
                async with asyncio.timeout(_GIVE_UP_S):
                    await self._task
            except TimeoutError:
                log.warning("log lines dropped", extra={"job": self._key[0], "lines": len(self._lines)})

    async def abandon(self) -> None:
        """As `close`, for an attempt that is stopped: what has not left after half a second is dropped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ABANDON_S):
                await self.close()
        if self._task is not None:
            self._task.cancel()

    async def _send_all(self) -> None:
        while self._lines:
            if not self._closing and len(self._lines) < _MAX_LINES:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_GATHER_S):
                        await self._wake.wait()
            await self._send(self._batch())
        self._task = None

    def _batch(self) -> tuple[str, ...]:
        size = count = 0
        for line in self._lines[:_MAX_LINES]:
            size += len(line)
            if count and size > _MAX_CHARACTERS:
                break
            count += 1
        batch, self._lines = tuple(line[:_MAX_CHARACTERS] for line in self._lines[:count]), self._lines[count:]
        return batch

    async def _send(self, batch: tuple[str, ...]) -> None:
        job, attempt = self._key
        first, self._next = self._next, self._next + len(batch)
        message = LogLines(job, attempt, self._site, first, batch, read_clocks().wall_ms)
        envelope = seal(message, self._signer).encode()
        for wait_s in (0.2, 0.5, 1, 2, 5, 10, 20, 0):
            try:
                await self._streams.append(
                    subjects.log_lines(job, attempt), envelope, message_id=f"{job}.{attempt}.log.{first}"
                )
                return
            except StoreFullError:
                return
            except TransportError:
                await asyncio.sleep(wait_s)
        log.warning("log lines dropped", extra={"job": job, "first": first, "lines": len(batch)})
