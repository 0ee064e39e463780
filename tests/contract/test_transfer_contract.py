"""Results through every Bulk there is: in memory, and over a lane to a real nats-server."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from edif_mesh.domain.ids import AttemptNumber, Digest, JobId, SiteId
from edif_mesh.errors import ResultError
from edif_mesh.results.index import CHUNK_BYTES, Entry, Index
from edif_mesh.results.manifest import packed
from edif_mesh.results.transfer import ResultWriter, index_parts
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import BufferSink
from edif_mesh.transport.bulk import NatsBulk
from edif_mesh.transport.memory import MemoryBroker
from edif_mesh.transport.nats_bus import connect
from edif_mesh.transport.ports import Bulk
from edif_mesh.wire import subjects
from edif_mesh.wire.codec import decode_as, encode
from edif_mesh.wire.messages import ResultPart
from tests.builders_transfer import a_manifest, an_index_of
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


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 5000, 123_456])
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
    assert (parts.index.archive_bytes, len(parts.index)) == (size, -(-size // CHUNK))
    sink = BufferSink()
    told: list[tuple[int, int]] = []
    stats = await ResultReader(make(), JOB, sink).read(a_manifest(JOB, ONE, parts), lambda *both: told.append(both))
    assert sink.data == data
    assert stats.fetched_bytes >= size
    assert told[-1] == (size, size)


async def test_a_reader_that_follows_has_the_checked_bytes_before_the_manifest_exists(make: MakeBulk) -> None:
    data = random.Random(3).randbytes(40 * CHUNK)
    reader = ResultReader(make(), JOB, sink := BufferSink(), open_part=read_part)
    placed = asyncio.Event()
    reader.follower.on_placed = placed.set
    await reader.follow()
    writer = ResultWriter(make(), JOB, ONE, chunk_bytes=CHUNK, announce=write_part)
    await writer.feed(data[: 2 * CHUNK + 10])
    await writer.cut()
    await writer.feed(data[2 * CHUNK + 10 :])
    async with asyncio.timeout(10):
        while reader.follower.prefix_chunks < 3:
            placed.clear()
            await placed.wait()
    assert sink.read(0, 2 * CHUNK + 10) == data[: 2 * CHUNK + 10]
    parts = await writer.finish()
    stats = await reader.read(a_manifest(JOB, ONE, parts))
    assert sink.data == data
    assert len(data) <= stats.fetched_bytes < 1.2 * len(data)


def write_part(first: int, entries: Sequence[Entry]) -> bytes:
    """What a site would sign."""
    part = ResultPart(Digest("0" * 64), JOB, ONE, SiteId("ansbach"), first, packed(Index(entries)), 0)
    return encode(part)


def read_part(raw: bytes) -> ResultPart:
    return decode_as(ResultPart, raw)


async def test_a_part_that_does_not_fit_is_not_believed_and_the_result_comes_all_the_same(make: MakeBulk) -> None:
    data = random.Random(4).randbytes(20 * CHUNK)
    reader = ResultReader(make(), JOB, sink := BufferSink(), open_part=read_part)
    refused = asyncio.Event()

    def lie(first: int, entries: Sequence[Entry]) -> bytes:
        refused.set()
        return write_part(first, [dataclasses.replace(entry, digest=bytes(32)) for entry in entries])

    await reader.follow()
    writer = ResultWriter(make(), JOB, ONE, chunk_bytes=CHUNK, announce=lie)
    await writer.feed(data)
    await writer.cut()
    await refused.wait()
    await reader.read(a_manifest(JOB, ONE, await writer.finish()))
    assert sink.data == data


async def test_a_small_result_that_was_followed_needs_nothing_more(make: MakeBulk) -> None:
    reader = ResultReader(make(), JOB, sink := BufferSink())
    await reader.follow()
    writer = ResultWriter(make(), JOB, ONE)
    await writer.feed(b"small")
    parts = await writer.finish()
    async with asyncio.timeout(10):
        while not reader.follower.fetched_bytes:  # noqa: ASYNC110 (no event to wait for)
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
    raw = random.Random(1).randbytes(2 * CHUNK_BYTES + 48)
    parts = index_parts(raw)
    assert [name for name, _ in parts] == ["index", "index-1", "index-2"]
    assert b"".join(part for _, part in parts) == raw


def test_what_covers_a_range_are_the_chunks_that_hold_it() -> None:
    index = an_index_of(10, 5, 20)
    assert index.starts == (0, 10, 15, 35)
    covering = {(a, b): list(index.covering(a, b)) for a in range(35) for b in range(a + 1, 36)}
    for (start, stop), chunks in covering.items():
        held = [n for n in range(3) if index.starts[n] < stop and index.starts[n + 1] > start]
        assert chunks == held
