"""Results over a real nats-server: killed brokers, cut readers, and every lie a site or broker could tell."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edif_mesh.domain.ids import AttemptNumber, Digest, JobId
from edif_mesh.errors import ChunkError, ManifestError, NotConnectedError, StoreFullError
from edif_mesh.results.index import Entry
from edif_mesh.results.manifest import ManifestParts
from edif_mesh.results.payloads import get_payload, put_payload
from edif_mesh.results.transfer import ResultWriter
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import BufferSink, FileSink
from edif_mesh.transport.bulk import NatsBulk
from edif_mesh.transport.nats_bus import Access, Connection, connect
from edif_mesh.wire import subjects
from edif_mesh.wire.messages import Manifest, PayloadRef
from tests.builders_transfer import a_manifest, an_index_of
from tests.contract.nats_starter import NatsServer

MAX_BYTES = {spec.name: 256 << 20 for spec in subjects.STREAMS}
JOB = JobId("j0000000000000000000000a")
ONE = AttemptNumber(1)
CHUNK = 64 << 10


@pytest.fixture
async def bulk(connection: Connection) -> AsyncIterator[NatsBulk]:
    bulk = NatsBulk.beside(connection)
    yield bulk
    await bulk.close()


def some_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


async def write(bulk: NatsBulk, data: bytes, attempt: AttemptNumber = ONE, chunk_bytes: int = CHUNK) -> Manifest:
    writer = ResultWriter(bulk, JOB, attempt, chunk_bytes=chunk_bytes)
    for start in range(0, len(data), 100_001):
        await writer.feed(data[start : start + 100_001])
    return a_manifest(JOB, attempt, await writer.finish())


async def test_killed_brokers_cost_nothing_but_time(
    server: NatsServer, connection: Connection, bulk: NatsBulk, tmp_path: Path
) -> None:
    data = some_bytes(24 << 20)
    writer = ResultWriter(bulk, JOB, ONE, chunk_bytes=CHUNK)
    reading = NatsBulk.beside(connection)
    reader = ResultReader(reading, JOB, FileSink(tmp_path / "result"))
    await reader.follow()

    async def produce() -> ManifestParts:
        for start in range(0, len(data), 100_001):
            await writer.feed(data[start : start + 100_001])
            await asyncio.sleep(0.004)
        return await writer.finish()

    producing = asyncio.create_task(produce())
    for _ in range(3):
        await asyncio.sleep(0.2)
        server.kill()
        server.start()
    parts = await asyncio.wait_for(producing, 60)
    stats = await reader.read(a_manifest(JOB, ONE, parts))
    assert (tmp_path / "result").read_bytes() == data
    assert [e.digest for e in parts.index.entries] == [
        hashlib.sha256(data[i : i + CHUNK]).digest() for i in range(0, len(data), CHUNK)
    ]
    held = await connection.streams.subjects(subjects.RESULTS_STREAM, subjects.result_chunks(JOB))
    assert set(held.values()) == {1}
    assert stats.fetched_bytes < 2 * len(data)
    await reading.close()


async def test_a_broker_killed_while_a_result_is_read(server: NatsServer, bulk: NatsBulk) -> None:
    data = some_bytes(24 << 20)
    manifest = await write(bulk, data)
    sink = BufferSink()
    killed = False

    def kill_once(done: int, total: int) -> None:
        nonlocal killed
        if not killed and done > total // 4:
            killed = True
            server.kill()
            server.start()

    stats = await ResultReader(bulk, JOB, sink).read(manifest, kill_once)
    assert killed
    assert sink.data == data
    assert stats.fetched_bytes < 2 * len(data)


async def test_a_cut_reader_goes_on_in_another_process_with_what_it_has(bulk: NatsBulk, tmp_path: Path) -> None:
    data = some_bytes(24 << 20)
    manifest = await write(bulk, data)

    class CutError(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done > total // 2:
            raise CutError

    with pytest.raises(CutError):
        await ResultReader(bulk, JOB, FileSink(tmp_path / "result")).read(manifest, cut)
    assert not (tmp_path / "result").exists()
    stats = await ResultReader(bulk, JOB, FileSink(tmp_path / "result")).read(manifest)
    assert (tmp_path / "result").read_bytes() == data
    assert stats.resumed_bytes > len(data) // 2
    assert stats.fetched_bytes <= len(data) - stats.resumed_bytes + 8 * CHUNK
    assert [name for name in sorted(os.listdir(tmp_path)) if name.startswith("result")] == ["result"]


async def test_a_partial_file_that_was_damaged_is_fetched_again_where_it_is_wrong(
    bulk: NatsBulk, tmp_path: Path
) -> None:
    data = some_bytes(2 << 20)
    manifest = await write(bulk, data)
    sink = FileSink(tmp_path / "result")
    sink.begin(JOB, ONE)
    for number in range(20):
        piece = data[number * CHUNK : (number + 1) * CHUNK]
        entry = Entry(CHUNK, CHUNK, 0, 0, 0, number, hashlib.sha256(piece).digest())
        sink.place(number, number * CHUNK, entry, memoryview(piece))
    sink.close()
    part = tmp_path / "result.part"
    raw = bytearray(part.read_bytes())
    raw[3 * CHUNK + 5] ^= 1
    part.write_bytes(raw)
    stats = await ResultReader(bulk, JOB, FileSink(tmp_path / "result")).read(manifest)
    assert (tmp_path / "result").read_bytes() == data
    assert stats.resumed_bytes == 19 * CHUNK


async def test_bulk_proves_itself_with_user_and_password_or_token(tmp_path: Path) -> None:
    for extra, good, bad in (
        ('authorization { user: "a", password: "right" }', {"user": "a", "password": "right"}, {"user": "a"}),
        ('authorization { token: "right" }', {"token": "right"}, {"token": "wrong"}),
    ):
        server = NatsServer(tmp_path, extra=extra)
        server.start()
        try:
            connection = await connect(server.url, name="friend", **good)
            await connection.streams.ensure(subjects.STREAMS, max_bytes=MAX_BYTES)
            bulk = NatsBulk.beside(connection)
            sink = BufferSink()
            data = some_bytes(300_000)
            await ResultReader(bulk, JOB, sink).read(await write(bulk, data))
            assert sink.data == data
            await bulk.close()
            stranger = NatsBulk(server.url, name="stranger", access=Access(**bad))
            with pytest.raises(NotConnectedError, match="uthorization"):
                await stranger.lane()
            await connection.close()
        finally:
            server.kill()
            server.wipe()


async def refused(bulk: NatsBulk, manifest: Manifest, match: str) -> None:
    with pytest.raises(ChunkError, match=match):
        await ResultReader(bulk, JOB, BufferSink(), patience_ms=300).read(manifest)


async def replace(connection: Connection, name: int | str, data: bytes) -> None:
    """What a lying broker does: another message under the same subject."""
    subject = subjects.result_chunk(JOB, ONE, name)
    await connection.streams.purge(subjects.RESULTS_STREAM, subject)
    await connection.streams.append(subject, data, message_id=f"lie {name} {len(data)}")


@pytest.mark.parametrize("number", [0, 3, 15])
async def test_a_flipped_bit_is_named(connection: Connection, bulk: NatsBulk, number: int) -> None:
    data = some_bytes(1 << 20)
    manifest = await write(bulk, data)
    piece = bytearray(data[number * CHUNK : (number + 1) * CHUNK])
    piece[7] ^= 4
    await replace(connection, number, bytes(piece))
    await refused(bulk, manifest, rf"\b{number} is altered")


async def test_a_flipped_bit_in_a_result_of_one_chunk(connection: Connection, bulk: NatsBulk) -> None:
    manifest = await write(bulk, b"hello")
    await replace(connection, 0, b"hallo")
    await refused(bulk, manifest, "altered")


async def test_a_truncated_chunk_is_named(connection: Connection, bulk: NatsBulk) -> None:
    data = some_bytes(1 << 20)
    manifest = await write(bulk, data)
    await replace(connection, 5, data[5 * CHUNK : 6 * CHUNK - 1])
    await refused(bulk, manifest, "Chunk 5 has 65535 bytes instead of 65536")


async def test_a_missing_chunk_is_named(connection: Connection, bulk: NatsBulk) -> None:
    manifest = await write(bulk, some_bytes(1 << 20))
    for number in (2, 9):
        await connection.streams.purge(subjects.RESULTS_STREAM, subjects.result_chunk(JOB, ONE, number))
    await refused(bulk, manifest, r"chunks 2, 9 are missing")


async def test_a_missing_only_chunk_is_named(bulk: NatsBulk) -> None:
    await refused(bulk, a_manifest(JOB, ONE, ManifestParts(an_index_of(1))), r"chunks 0 is missing")


async def test_a_chunk_of_another_result_is_refused(connection: Connection, bulk: NatsBulk) -> None:
    manifest = await write(bulk, some_bytes(1 << 20))
    await replace(connection, 4, some_bytes(CHUNK, seed=2))
    await refused(bulk, manifest, "Chunk 4 is altered")


async def test_a_chunk_that_the_manifest_does_not_know_is_not_even_fetched(
    connection: Connection, bulk: NatsBulk
) -> None:
    data = some_bytes(1 << 20)
    manifest = await write(bulk, data)
    await connection.streams.append(subjects.result_chunk(JOB, ONE, 16), b"x" * CHUNK, message_id="foreign")
    sink = BufferSink()
    stats = await ResultReader(bulk, JOB, sink).read(manifest)
    assert sink.data == data
    assert stats.read_bytes == len(data)


async def test_chunks_that_changed_places_are_named(connection: Connection, bulk: NatsBulk) -> None:
    data = some_bytes(1 << 20)
    manifest = await write(bulk, data)
    await replace(connection, 4, data[5 * CHUNK : 6 * CHUNK])
    await replace(connection, 5, data[4 * CHUNK : 5 * CHUNK])
    await refused(bulk, manifest, "Chunk [45] is altered")


async def test_a_chunk_that_comes_twice_does_not_stand_in_for_another(connection: Connection, bulk: NatsBulk) -> None:
    data = some_bytes(1 << 20)
    manifest = await write(bulk, data)
    await replace(connection, 4, data[3 * CHUNK : 4 * CHUNK])
    await refused(bulk, manifest, "Chunk 4 is altered")


@pytest.mark.parametrize("lie", [b"", bytes(48 * 16), bytes(48 * 15)])
async def test_an_altered_index_is_refused(connection: Connection, bulk: NatsBulk, lie: bytes) -> None:
    manifest = await write(bulk, some_bytes(1 << 20))
    await replace(connection, "index", lie)
    with pytest.raises((ChunkError, ManifestError), match=r"index of the result is (altered|missing or truncated)"):
        await ResultReader(bulk, JOB, BufferSink(), patience_ms=300).read(manifest)


async def test_nothing_stands_under_the_results_name_when_a_chunk_is_wrong(
    connection: Connection, bulk: NatsBulk, tmp_path: Path
) -> None:
    manifest = await write(bulk, some_bytes(1 << 20))
    await replace(connection, 9, b"z" * CHUNK)
    with pytest.raises(ChunkError, match="Chunk 9 is altered"):
        await ResultReader(bulk, JOB, FileSink(tmp_path / "result"), patience_ms=300).read(manifest)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"archive_bytes": (1 << 20) + 1}, "the manifest says"),
        ({"archive_bytes": (1 << 20) - 1}, "the manifest says"),
        ({"archive_bytes": -1, "chunks": 0}, "cannot be"),
        ({"archive_bytes": 1 << 60}, "cannot be"),
        ({"archive_bytes": 1 << 40}, "do not make"),
        ({"chunks": 17}, "index of the result is missing or truncated"),
        ({"chunks": 1 << 40}, "do not make"),
        ({"chunks": 2}, "lacks its index"),
        ({"stored_bytes": 5}, "stores 1048576 bytes"),
        ({"index": "no base64"}, "no base64"),
        ({"index": "AAAA"}, "does not fit the manifest"),
        ({"root": Digest("no")}, "no SHA-256"),
        ({"job": JobId("j0000000000000000000000b")}, "of job"),
        ({"format": "pickle"}, "unknown format"),
    ],
)
async def test_a_lying_manifest_is_refused(bulk: NatsBulk, change: dict, match: str) -> None:
    manifest = dataclasses.replace(await write(bulk, some_bytes(1 << 20)), **change)
    with pytest.raises((ManifestError, ChunkError), match=match):
        await ResultReader(bulk, JOB, BufferSink(), patience_ms=300).read(manifest)


async def test_another_attempts_bytes_do_not_become_the_result(connection: Connection, bulk: NatsBulk) -> None:
    good = some_bytes(1 << 20, seed=2)
    reading = NatsBulk.beside(connection)
    sink = BufferSink()
    reader = ResultReader(reading, JOB, sink)
    await reader.follow()
    failed = ResultWriter(bulk, JOB, ONE, chunk_bytes=CHUNK)
    await failed.feed(some_bytes(700_000, seed=1))
    failed.abort()
    await reader.read(await write(bulk, good, AttemptNumber(2)))
    assert sink.data == good
    await reader.close()
    await reading.close()


async def test_other_bytes_under_a_written_subject_are_an_error_and_the_same_bytes_are_not(bulk: NatsBulk) -> None:
    manifest = await write(bulk, some_bytes(300_000))
    assert await write(bulk, some_bytes(300_000)) == manifest
    with pytest.raises(ChunkError, match="already holds other bytes"):
        await write(bulk, some_bytes(300_000, seed=9))


async def test_a_full_store_is_a_sentence(connection: Connection, bulk: NatsBulk) -> None:
    await connection.streams.ensure(subjects.STREAMS, max_bytes={**MAX_BYTES, subjects.RESULTS_STREAM: 1 << 20})
    with pytest.raises(StoreFullError, match="store is full"):
        await write(bulk, some_bytes(4 << 20))


@pytest.mark.parametrize("size", [0, 1, 1000, (512 << 10) + 1, 3 << 20])
async def test_a_payload_comes_back_verified(connection: Connection, size: int) -> None:
    data = some_bytes(size)
    ref = PayloadRef(Digest(hashlib.sha256(data).hexdigest()), size)
    await put_payload(connection.streams, JOB, data)
    await put_payload(connection.streams, JOB, data)
    assert await get_payload(connection.streams, JOB, ref) == data


async def test_a_wrong_or_missing_payload_is_refused(connection: Connection) -> None:
    data = some_bytes(1 << 20)
    ref = PayloadRef(Digest(hashlib.sha256(data).hexdigest()), len(data))
    with pytest.raises(ChunkError, match="missing"):
        await get_payload(connection.streams, JOB, ref, patience_s=0.3)
    await put_payload(connection.streams, JOB, data[:-1] + b"!")
    with pytest.raises(ChunkError, match="altered"):
        await get_payload(connection.streams, JOB, ref)
    longer = dataclasses.replace(ref, size_bytes=len(data) - 1)
    with pytest.raises(ChunkError, match="bytes"):
        await get_payload(connection.streams, JOB, longer)
    with pytest.raises(ChunkError, match="cannot be"):
        await get_payload(connection.streams, JOB, dataclasses.replace(ref, size_bytes=1 << 50))
