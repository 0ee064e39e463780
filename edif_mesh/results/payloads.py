"""A job's payload on its way from the researcher to the site: durable, in chunks, checked against its reference."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from edif_mesh.domain.ids import JobId
from edif_mesh.errors import ChunkError
from edif_mesh.transport.ports import Streams
from edif_mesh.wire import subjects
from edif_mesh.wire.messages import PayloadRef

CHUNK_BYTES = 512 << 10
"""Part of the protocol: the reader derives the number of chunks from it."""
_AT_ONCE = 8
_PATIENCE_S = 5.0
MAX_PAYLOAD_BYTES = 256 << 20
T = TypeVar("T")


async def put_payload(streams: Streams, job: JobId, data: bytes, *, timeout_ms: int = 30_000) -> None:
    """Store `data` durably under `job`; a repeat is harmless. One round trip when at most 512 KiB.

    Raises:
        StoreFullError: the broker's store is full.
        NoReplyError, NotConnectedError: not known to be stored in time.
    """
    room = asyncio.Semaphore(_AT_ONCE)

    async def put(number: int) -> None:
        async with room:
            chunk = data[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
            subject = subjects.payload_chunk(job, number)
            message_id = f"{subject}:{hashlib.sha256(chunk).hexdigest()}"
            await streams.append(subject, chunk, message_id=message_id, timeout_ms=timeout_ms)

    await _all([put(number) for number in range(_chunks(len(data)))])


async def get_payload(streams: Streams, job: JobId, ref: PayloadRef, *, patience_s: float = _PATIENCE_S) -> bytes:
    """Return the payload that `ref` names, verified. One round trip when at most 512 KiB.

    Raises:
        ChunkError: a chunk is missing, or the bytes are not those that the order names.
        NoReplyError, NotConnectedError: the broker did not answer.
    """
    if not 0 <= ref.size_bytes <= MAX_PAYLOAD_BYTES:
        raise ChunkError(f"A payload of {ref.size_bytes} bytes cannot be; at most {MAX_PAYLOAD_BYTES} can.")
    room = asyncio.Semaphore(_AT_ONCE)
    deadline = time.monotonic() + patience_s

    async def get(number: int) -> bytes:
        async with room:
            while True:
                stored = await streams.get(subjects.PAYLOADS_STREAM, subjects.payload_chunk(job, number))
                if stored is not None:
                    return stored.data
                if time.monotonic() > deadline:
                    raise ChunkError(f"Chunk {number} of the payload of {job} is missing at the broker.")
                await asyncio.sleep(0.2)

    data = b"".join(await _all([get(number) for number in range(_chunks(ref.size_bytes))]))
    if len(data) != ref.size_bytes:
        raise ChunkError(f"The payload of {job} has {len(data)} bytes; its order names {ref.size_bytes}.")
    if hashlib.sha256(data).hexdigest() != ref.digest:
        raise ChunkError(f"The payload of {job} was altered: it is not the one that its order names.")
    return data


def _chunks(size: int) -> int:
    return max(1, -(-size // CHUNK_BYTES))


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run together; the first error ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
