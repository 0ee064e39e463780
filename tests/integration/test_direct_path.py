"""Results straight from a site: a real endpoint process and a real broker, and what happens when the first one fails or lies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from edif_mesh.domain.ids import JobId, SiteId, job_id
from edif_mesh.results import path_choice
from edif_mesh.results.direct_link import DirectError
from edif_mesh.results.direct_source import BATCH_BYTES
from edif_mesh.results.index import CHUNK_BYTES
from edif_mesh.results.paths import Paths
from edif_mesh.results.sources import Address
from edif_mesh.results.transfer_read import ReadStats, ResultReader
from edif_mesh.results.transfer_sinks import BufferSink
from edif_mesh.transport.bulk import NatsBulk
from edif_mesh.transport.nats_bus import connect
from edif_mesh.wire import subjects
from edif_mesh.wire.messages import DirectEndpoint, FetchResult, Manifest
from site_agent.direct.endpoint import FAILURES_AN_ADDRESS
from site_agent.direct.kept import data_file
from site_agent.direct.requests import parse_numbers
from tests.contract.nats_starter import NatsServer
from tests.direct_rig import ONE, SITE, DirectSite, now_ms, some_bytes

pytestmark = pytest.mark.asyncio(loop_scope="module")
SIZE = 48 << 20
DATA = some_bytes(SIZE)
JOB = job_id(now_ms(), 1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bulk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NatsBulk]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    connection = await connect(server.url, name="direct")
    await connection.streams.ensure(subjects.STREAMS, max_bytes={spec.name: 256 << 20 for spec in subjects.STREAMS})
    bulk = NatsBulk.beside(connection)
    yield bulk
    await bulk.close()
    await connection.close()
    server.kill()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DirectSite]:
    site = DirectSite(tmp_path_factory.mktemp("site"))
    site.start()
    yield site
    site.kill()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def manifest(bulk: NatsBulk, site: DirectSite) -> Manifest:
    return await site.write(bulk, JOB, DATA)


async def read(bulk: NatsBulk, manifest: Manifest, paths: Paths) -> ReadStats:
    sink = BufferSink()
    stats = await ResultReader(bulk, manifest.job, sink, sources=paths.sources).read(manifest)
    assert hashlib.sha256(sink.data).digest() == hashlib.sha256(DATA).digest()
    return stats


async def straight(paths: Paths, manifest: Manifest) -> int:
    """Take everything by the direct way alone; returns how many bytes came."""
    wanted = dict.fromkeys(range(manifest.chunks), CHUNK_BYTES)
    wanted[manifest.chunks - 1] = manifest.archive_bytes - (manifest.chunks - 1) * CHUNK_BYTES
    size = 0
    async for batch in paths.direct(manifest).chunks(Address(manifest.job, manifest.attempt), wanted):
        for number, data in batch:
            start = number * CHUNK_BYTES
            assert data == DATA[start : start + len(data)]
            size += len(data)
    return size


def _at(manifest: Manifest, url: str, site: DirectSite) -> Manifest:
    """The manifest of a site that names this address."""
    return replace(manifest, direct=(DirectEndpoint(url, site.digest),))


async def test_everything_comes_straight_from_the_site(bulk: NatsBulk, site: DirectSite, manifest: Manifest) -> None:
    assert await straight(site.paths(bulk), manifest) == SIZE


async def test_both_ways_are_measured_and_each_byte_comes_once(
    bulk: NatsBulk, site: DirectSite, manifest: Manifest
) -> None:
    paths = site.paths(bulk)
    stats = await read(bulk, manifest, paths)
    known = paths.known(SITE)
    assert known.direct is not None
    assert known.broker is not None
    assert stats.fetched_bytes < 1.05 * SIZE
    assert stats.refused_chunks == 0


async def test_a_killed_endpoint_is_made_good_by_the_broker(bulk: NatsBulk, manifest: Manifest, tmp_path: Path) -> None:
    site = DirectSite(tmp_path)
    site.start()
    job = job_id(now_ms(), 2)
    told = await site.write(bulk, job, DATA)
    paths, sink = site.paths(bulk), BufferSink()
    paths.learn(SITE, path_choice.Path.BROKER, 1, 1.0)

    def kill(done: int, _: int) -> None:
        if done > SIZE // 8:
            site.kill()

    stats = await ResultReader(bulk, job, sink, sources=paths.sources).read(told, kill)
    assert sink.data == DATA
    assert stats.fetched_bytes < 1.05 * SIZE
    assert paths.known(SITE).barred_until_ms > 0


REFUSED: list[tuple[str, str]] = [
    ("stranger", "unknown_key"),
    ("revoked", "revoked_key"),
    ("other", "not_found"),
    ("old", "stale"),
    ("another job", "wire"),
    ("another site", "wire"),
]


@pytest.mark.parametrize(("who", "code"), REFUSED)
async def test_who_may_not_read_it_is_refused_by_name(
    bulk: NatsBulk, site: DirectSite, manifest: Manifest, who: str, code: str
) -> None:
    key = {"stranger": site.stranger, "other": site.other, "revoked": site.revoked}.get(who, site.owner)
    changes: dict[str, Callable[[FetchResult], FetchResult]] = {
        "old": lambda asked: replace(asked, issued_at_ms=asked.issued_at_ms - 120_000),
        "another job": lambda asked: replace(asked, job=JobId("j0000000000000000000000a")),
        "another site": lambda asked: replace(asked, site=SiteId("heilbronn")),
    }
    with pytest.raises(DirectError, match=code):
        await straight(site.paths(bulk, key, changes.get(who)), manifest)


async def test_a_key_that_is_revoked_while_it_reads_is_refused_at_its_next_request(
    bulk: NatsBulk, tmp_path: Path, manifest: Manifest
) -> None:
    site = DirectSite(tmp_path)
    site.start()
    try:
        told = site.keep(JOB, DATA)
        assert await straight(site.paths(bulk), told) == SIZE
        site.trust.revoke(site.owner.id, now_ms())
        with pytest.raises(DirectError, match="revoked_key"):
            await straight(site.paths(bulk), told)
        stats = await read(bulk, told, site.paths(bulk))
        assert stats.fetched_bytes < 1.05 * SIZE
    finally:
        site.kill()


async def test_an_address_that_proves_nothing_too_often_is_told_to_wait(
    bulk: NatsBulk, tmp_path: Path, manifest: Manifest
) -> None:
    site = DirectSite(tmp_path)
    site.start()
    try:
        paths = site.paths(bulk, site.stranger)
        told = site.keep(JOB, DATA)
        for _ in range(FAILURES_AN_ADDRESS):
            with pytest.raises(DirectError):
                await straight(paths, told)
        with pytest.raises(DirectError, match="too_many"):
            await straight(site.paths(bulk), told)
    finally:
        site.kill()


async def test_a_deleted_job_is_not_served_any_more(bulk: NatsBulk, site: DirectSite) -> None:
    job = job_id(now_ms(), 5)
    told = site.keep(job, DATA)
    assert await straight(site.paths(bulk), told) == SIZE
    site.store.drop(job)
    with pytest.raises(DirectError, match="not_found"):
        await straight(site.paths(bulk), told)


async def test_what_is_not_there_is_refused_like_anothers(bulk: NatsBulk, site: DirectSite, manifest: Manifest) -> None:
    texts = []
    for key, job in ((site.other, JOB), (site.owner, job_id(now_ms(), 3))):
        with pytest.raises(DirectError) as refused:
            await straight(site.paths(bulk, key), replace(manifest, job=job))
        texts.append(str(refused.value).replace(job, "JOB"))
    assert texts[0] == texts[1]


async def test_another_certificate_is_not_asked(bulk: NatsBulk, site: DirectSite, manifest: Manifest) -> None:
    told = replace(manifest, direct=(DirectEndpoint(site.endpoint.url, "0" * 64),))
    with pytest.raises(DirectError, match="another certificate"):
        await straight(site.paths(bulk), told)
    await read(bulk, told, site.paths(bulk))


async def test_a_site_that_cannot_be_reached_is_left_aside(
    bulk: NatsBulk, site: DirectSite, manifest: Manifest
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        told = _at(manifest, f"https://127.0.0.1:{closed.getsockname()[1]}", site)
        paths = site.paths(bulk)
        stats = await read(bulk, told, paths)
    assert stats.fetched_bytes < 1.05 * SIZE
    assert path_choice.next_step(paths.known(SITE), SIZE, 0).path is path_choice.Path.BROKER


async def test_bytes_that_a_disk_has_changed_are_not_placed(bulk: NatsBulk, tmp_path: Path, manifest: Manifest) -> None:
    site = DirectSite(tmp_path)
    site.start()
    try:
        job = job_id(now_ms(), 4)
        told = await site.write(bulk, job, DATA)
        with data_file(site.folder / "results", job, ONE).open("r+b") as file:
            file.seek(5 << 20)
            file.write(b"\0\1\2\3" * 64)
        paths = site.paths(bulk)
        stats = await read(bulk, told, paths)
        assert stats.refused_chunks == 1
        assert paths.known(SITE).barred_until_ms > 3_600_000
    finally:
        site.kill()


# ------------------------------------------------------------------------------------------------- hostile endpoints

Lie = Callable[[ssl.SSLSocket, int], object]


class Hostile:
    """A TLS server with the site's certificate that answers as it likes; a lie is told how many bytes were asked for."""

    def __init__(self, certificate: Path, lie: Lie) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._lie = lie
        self.url = f"https://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(connection, server_side=True) as link:
            if not (request := link.recv(16 << 10)):
                return
            asked = parse_numbers(request.split(b"numbers=")[1].split(b" ")[0].decode())
            self._lie(link, sum(len(SIZES[number]) for part in asked for number in part))

    def close(self) -> None:
        self._listening.close()


SIZES = [DATA[start : start + CHUNK_BYTES] for start in range(0, SIZE, CHUNK_BYTES)]


def _ok(length: int | str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode()


LIES: dict[str, Lie] = {
    "no end of the head": lambda link, _: link.sendall(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000),
    "no HTTP": lambda link, _: link.sendall(os.urandom(1 << 20) + b"\r\n\r\n"),
    "another length": lambda link, _: link.sendall(_ok(1 << 50)),
    "no length": lambda link, _: link.sendall(b"HTTP/1.1 200 OK\r\n\r\n"),
    "a negative length": lambda link, _: link.sendall(_ok("-1")),
    "hangs up": lambda link, _: link.close(),
    "too few bytes": lambda link, size: link.sendall(_ok(size) + bytes(size // 2)),
    "wrong bytes": lambda link, size: link.sendall(_ok(size) + bytes(size)),
    "more bytes for ever": lambda link, size: link.sendall(_ok(size) + bytes(size) + bytes(64 << 20)),
    "silence": lambda link, size: (link.sendall(_ok(size) + bytes(1 << 20)), link.recv(1 << 20), link.recv(1)),
    "a redirect": lambda link, _: link.sendall(b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/\r\n\r\n"),
}


@pytest.mark.parametrize("lie", [pytest.param(lie, marks=pytest.mark.slow if lie == "silence" else ()) for lie in LIES])
async def test_a_hostile_endpoint_costs_nothing_but_a_try(
    bulk: NatsBulk, site: DirectSite, manifest: Manifest, lie: str
) -> None:
    hostile = Hostile(site.folder / "certificate.pem", LIES[lie])
    try:
        paths = site.paths(bulk)
        stats = await asyncio.wait_for(read(bulk, _at(manifest, hostile.url, site), paths), 30)
        assert paths.known(SITE).barred_until_ms > 0
        assert stats.fetched_bytes < SIZE + 2 * BATCH_BYTES
    finally:
        hostile.close()
