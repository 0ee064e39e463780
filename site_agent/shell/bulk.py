"""Payloads in and results out, over connections of their own: control messages never wait behind them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence

from edif_mesh.domain.ids import JobId
from edif_mesh.errors import NoReplyError, NotConnectedError, StoreFullError
from edif_mesh.results.manifest import ManifestParts
from edif_mesh.results.payloads import get_payload
from edif_mesh.results.transfer import Announce, Form, ResultWriter
from edif_mesh.transport.ports import Arrived, Bulk, Streams
from edif_mesh.wire.messages import PayloadRef
from site_agent.core.state import AttemptKey
from site_agent.shell.spool import Cut, Spool

log = logging.getLogger(__name__)

_RETRY_S, _ROOM_S = 0.5, 2.0
_PAYLOAD_PATIENCE_S = 2.0


class Cargo:
    """What the agent moves in bulk: `streams` for payloads, `bulk` for results."""

    def __init__(self, streams: Streams, bulk: Bulk) -> None:
        self._streams, self._bulk = streams, _PatientBulk(bulk)

    async def payload(self, job: JobId, ref: PayloadRef) -> bytes:
        """Return the payload. Raises ChunkError when it is missing or not what `ref` names; waits for the broker."""
        while True:
            try:
                return await get_payload(self._streams, job, ref, patience_s=_PAYLOAD_PATIENCE_S)
            except (NoReplyError, NotConnectedError) as error:
                log.info("payload waits", extra={"job": job, "text": str(error)})
                await asyncio.sleep(_RETRY_S)

    async def store(
        self, key: AttemptKey, spool: Spool, *, form: Form | None = None, announce: Announce | None = None
    ) -> ManifestParts:
        """Store everything that `spool` yields; waits for the broker. Raises StoreFullError, ChunkError."""
        writer = ResultWriter(self._bulk, key[0], key[1], form=form, announce=announce)
        try:
            while (item := await spool.get()) is not None:
                if isinstance(item, Cut):
                    await writer.cut(item.element)
                else:
                    # Nobody else holds the chunk, so it need not be copied.
                    await writer.feed(memoryview(item).toreadonly())
            return await writer.finish()
        finally:
            writer.abort()

    async def close(self) -> None:
        """Close the bulk connection; idempotent."""
        await self._bulk.close()


class _PatientBulk:
    """A bulk connection that goes on storing for as long as its caller lives: a finished result is not given up."""

    def __init__(self, bulk: Bulk) -> None:
        self._bulk = bulk
        self._closed = False

    async def store(
        self, subject: str, pieces: Sequence[bytes | memoryview], *, message_id: str, timeout_ms: int = 60_000
    ) -> bool:
        while True:
            try:
                return await self._bulk.store(subject, pieces, message_id=message_id, timeout_ms=timeout_ms)
            except (NoReplyError, NotConnectedError, StoreFullError) as error:
                if self._closed:
                    raise
                # A full store takes no new orders, and what was accepted is not lost for want of room: it waits for some.
                log.warning("result waits", extra={"subject": subject, "text": str(error)})
                await asyncio.sleep(_ROOM_S if isinstance(error, StoreFullError) else _RETRY_S)

    async def get(self, stream: str, subject: str) -> Arrived | None:
        return await self._bulk.get(stream, subject)

    def push(self, stream: str, subject: str) -> AsyncGenerator[list[Arrived], None]:
        return self._bulk.push(stream, subject)

    async def listen(
        self, subject: str, receiver: Callable[[str, memoryview], None], *, at_most: int
    ) -> Callable[[], None]:
        return await self._bulk.listen(subject, receiver, at_most=at_most)

    async def close(self) -> None:
        self._closed = True
        await self._bulk.close()
