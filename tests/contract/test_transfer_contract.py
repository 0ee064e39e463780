"""Results through every Bulk there is: in memory, and over a lane to a real nats-server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.errors import ResultError
from edif_mesh.results.transfer import ResultWriter, index_parts
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import BufferSink
from edif_mesh.transport.bulk import NatsBulk
from edif_mesh.transport.memory import MemoryBroker
from edif_mesh.transport.nats_bus import connect
from edif_mesh.transport.ports import Bulk
from edif_mesh.wire import subjects
from tests.builders_transfer import a_manifest
from tests.contract.nats_starter import NatsServer

MAX_BYTES = {spec.name: 64 << 20 for spec in subjects.STREAMS}
JOB = JobId("j0000000000000000000000a")
ONE = AttemptNumber(1)
CHUNK = 1000

MakeBulk = Callable[[], Bulk]


@pytest.fixture(params=["memory", "nats"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MakeBulk]:
    made: list[Bulk] = []

    if request.param == "memory":
        broker = MemoryBroker()
        await broker.durable().ensure(subjects.STREAMS, max_bytes=MAX_BYTES)

        def make() -> Bulk:
            made.append(broker.bulk())
            return made[-1]

        yield make
    else:
        server = NatsServer(tmp_path)
        server.start()
        connection = await connect(server.url, name="contract")
        await connection.streams.ensure(subjects.STREAMS, max_bytes=MAX_BYTES)

        def make() -> Bulk:
            made.append(NatsBulk.beside(connection))
            return made[-1]

        yield make
        await connection.close()
        server.kill()
    for bulk in made:
        await bulk.close()


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5000, 123_456])
async def test_a_result_of_any_size_comes_back_whole(make: MakeBulk, size: int) -> None:
    rng = random.Random(size)
    data = rng.randbytes(size)
    writer = ResultWriter(make(), JOB, ONE, chunk_bytes=CHUNK)
    at = 0
    while at < size:
        step = rng.randint(1, 3000)
        reused = bytearray(data[at : at + step])
        await writer.feed(memoryview(reused))
        reused[:] = bytes(len(reused))  # the caller's buffer is its own again
        at += step
    parts = await writer.finish()
    assert (parts.archive_bytes, parts.chunks) == (size, -(-size // CHUNK))
    sink = BufferSink()
    told: list[tuple[int, int]] = []
    stats = await ResultReader(make(), JOB, sink).read(a_manifest(JOB, ONE, parts), lambda *both: told.append(both))
    assert sink.data == data
    assert stats.fetched_bytes >= size
    assert not size or told[-1] == (size, size)


async def test_a_reader_that_follows_has_the_bytes_before_the_manifest_exists(make: MakeBulk) -> None:
    data = random.Random(3).randbytes(40 * CHUNK)
    reader = ResultReader(make(), JOB, sink := BufferSink())
    await reader.follow()
    writer = ResultWriter(make(), JOB, ONE, chunk_bytes=CHUNK)
    for start in range(0, len(data), CHUNK):
        await writer.feed(data[start : start + CHUNK])
    parts = await writer.finish()
    async with asyncio.timeout(10):
        while len(reader._early.get(ONE, {})) < 40:  # noqa: ASYNC110 (no event to wait for)
            await asyncio.sleep(0.01)
    stats = await reader.read(a_manifest(JOB, ONE, parts))
    assert sink.data == data
    assert stats.fetched_bytes < 1.2 * len(data)


async def test_a_small_result_that_was_followed_needs_nothing_more(make: MakeBulk) -> None:
    reader = ResultReader(make(), JOB, sink := BufferSink())
    await reader.follow()
    writer = ResultWriter(make(), JOB, ONE)
    await writer.feed(b"small")
    parts = await writer.finish()
    async with asyncio.timeout(10):
        while not reader._early:  # noqa: ASYNC110 (no event to wait for)
            await asyncio.sleep(0.01)
    stats = await reader.read(a_manifest(JOB, ONE, parts))
    assert sink.data == b"small"
    assert stats.fetched_bytes == 5


async def test_a_finished_or_aborted_writer_takes_nothing_more(make: MakeBulk) -> None:
    finished = ResultWriter(make(), JOB, ONE)
    await finished.finish()
    with pytest.raises(ResultError):
        await finished.feed(b"more")
    aborted = ResultWriter(make(), JOB, AttemptNumber(2))
    aborted.abort()
    aborted.abort()
    with pytest.raises(ResultError):
        await aborted.finish()


def test_a_long_index_is_split() -> None:
    digests = [bytes([number]) * 32 for number in range(70)]
    parts = index_parts(digests, 1000)
    assert [name for name, _ in parts] == ["index", "index-1", "index-2"]
    assert b"".join(part for _, part in parts) == b"".join(digests)
