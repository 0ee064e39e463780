"""Payloads in and results out, over a connection of its own: control messages never wait behind them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass

from edif_mesh.domain.ids import Digest, JobId
from edif_mesh.errors import ChunkError, NotFoundError, StoreFullError, TransportError
from edif_mesh.transport.ports import Streams
from edif_mesh.wire import subjects
from edif_mesh.wire.messages import PayloadRef
from site_agent.core.state import AttemptKey
from site_agent.shell.spool import Spool

log = logging.getLogger(__name__)

CHUNK_BYTES = 512 << 10
_IN_FLIGHT = 32
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Stored:
    """A whole result at the broker, as its manifest describes it."""

    archive_bytes: int
    chunk_bytes: int
    chunks: int
    root: Digest


class Bulk:
    """What the agent moves in bulk."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def payload(self, job: JobId, ref: PayloadRef) -> bytes:
        """Return the payload. Raises NotFoundError when it is not stored, ChunkError when it is not what `ref` names."""
        data = bytearray()
        number = 0
        while len(data) < ref.size_bytes or number == 0:
            chunk = await self._chunk(job, number)
            data += chunk
            number += 1
            if not chunk:
                break
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != ref.size_bytes or digest != ref.digest:
            raise ChunkError(f"The stored payload of {job} is not the one that its order names; nothing was run.")
        return bytes(data)

    async def store(self, key: AttemptKey, spool: Spool) -> Stored:
        """Store everything that `spool` yields, and the index; while the broker is away, wait. Raises StoreFullError."""
        digests: list[bytes] = []
        total = 0
        window = asyncio.Semaphore(_IN_FLIGHT)
        async with asyncio.TaskGroup() as group:
            while (chunk := await spool.get()) is not None:
                await window.acquire()
                digests.append(hashlib.sha256(chunk).digest())
                total += len(chunk)
                task = group.create_task(self._append(key, len(digests) - 1, bytes(chunk)))
                task.add_done_callback(lambda _: window.release())
        index = b"".join(digests)
        await self._append(key, "index", index)
        return Stored(total, CHUNK_BYTES, len(digests), Digest(hashlib.sha256(index).hexdigest()))

    async def _chunk(self, job: JobId, number: int) -> bytes:
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        while True:
            try:
                stored = await self._streams.get(subjects.PAYLOADS_STREAM, subjects.payload_chunk(job, number))
            except TransportError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.2)
                continue
            if stored is None:
                raise NotFoundError(f"The payload of {job} is not stored at the broker (chunk {number}).")
            return stored.data

    async def _append(self, key: AttemptKey, name: int | str, chunk: bytes) -> None:
        subject = subjects.result_chunk(key[0], key[1], name)
        wait_s = 0.1
        while True:
            try:
                await self._streams.append(subject, chunk, message_id=f"{key[0]}.{key[1]}.{name}")
                return
            except StoreFullError:
                raise
            except TransportError as error:
                log.info("result chunk waits", extra={"subject": subject, "text": str(error)})
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, 5.0)
