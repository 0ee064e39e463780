"""Results straight from a site: a real endpoint process and a real broker, and what happens when the first one fails or lies."""

from __future__ import annotations

import asyncio
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

from edif_mesh.domain.ids import JobId, job_id
from edif_mesh.errors import EdifError
from edif_mesh.results import path_choice
from edif_mesh.results.direct_link import DirectError
from edif_mesh.results.paths import Paths
from edif_mesh.results.sources import Address
from edif_mesh.results.transfer_read import ReadStats, ResultReader
from edif_mesh.results.transfer_sinks import BufferSink
from edif_mesh.transport.bulk import NatsBulk
from edif_mesh.transport.nats_bus import connect
from edif_mesh.wire import subjects
from edif_mesh.wire.messages import DirectEndpoint, FetchResult, Manifest
from site_agent.direct.kept import KeptResult, data_file
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
    wanted = dict.fromkeys(range(manifest.chunks), 960 << 10)
    wanted[manifest.chunks - 1] = manifest.archive_bytes - (manifest.chunks - 1) * (960 << 10)
    size = 0
    async for batch in paths.direct(manifest).chunks(Address(manifest.job, manifest.attempt), wanted):
        for number, data in batch:
            start = number * (960 << 10)
            assert data == DATA[start : start + len(data)]
            size += len(data)
    return size


async def test_everything_comes_straight_from_the_site(bulk: NatsBulk, site: DirectSite, manifest: Manifest) -> None:
    assert await straight(site.paths(bulk), manifest) == SIZE


async def test_both_ways_are_measured_and_each_byte_comes_once(
    bulk: NatsBulk, site: DirectSite, manifest: Manifest
) -> None:
    paths = site.paths(bulk)
    stats = await read(bulk, manifest, paths)
    known = paths.known(SITE)
    assert known.direct is not None and known.broker is not None
    assert stats.fetched_bytes < 1.05 * SIZE
    assert stats.refused_chunks == 0


async def test_a_killed_endpoint_is_made_good_by_the_broker(bulk: NatsBulk, manifest: Manifest, tmp_path: Path) -> None:
    site = DirectSite(tmp_path)
    site.start()
    job = job_id(now_ms(), 2)
    told = await site.write(bulk, job, DATA)
    paths, sink = site.paths(bulk), BufferSink()

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
    bulk: NatsBulk, manifest: Manifest, tmp_path: Path, who: str, code: str
) -> None:
    site = DirectSite(tmp_path)
    keeping = site.store.open(JOB, ONE, site.owner.id)
    site.start()
    try:
        told = await site.write(bulk, JOB, DATA)
        key = {"stranger": site.stranger, "other": site.other}.get(who, site.owner)
        changes: dict[str, Callable[[FetchResult], FetchResult]] = {
            "old": lambda asked: replace(asked, issued_at_ms=asked.issued_at_ms - 120_000),
            "another job": lambda asked: replace(asked, job=JobId("j0000000000000000000000a")),
            "another site": lambda asked: replace(asked, site="heilbronn"),  # type: ignore[arg-type]
        }
        if who == "revoked":
            site.trust.revoke(site.owner.id, now_ms())
        paths = site.paths(bulk, key, changes.get(who))
        with pytest.raises(DirectError, match=code):
            await straight(paths, told)
        await read(bulk, told, paths)
    finally:
        keeping.abandon()
        site.kill()


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
        told = replace(manifest, direct=(DirectEndpoint(f"https://127.0.0.1:{closed.getsockname()[1]}", site.digest),))
        paths = site.paths(bulk)
        stats = await read(bulk, told, paths)
    assert stats.fetched_bytes < 1.05 * SIZE
    assert path_choice.next_step(paths.known(SITE), SIZE, now_ms() * 0).path is path_choice.Path.BROKER


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


class Hostile:
    """A TLS server with the site's certificate that answers as it likes."""

    def __init__(self, certificate: Path, answer: Callable[[ssl.SSLSocket], None]) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._answer = answer
        self.url = f"https://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        try:
            with self._context.wrap_socket(connection, server_side=True) as link:
                link.recv(16 << 10)
                self._answer(link)
        except OSError:
            pass

    def close(self) -> None:
        self._listening.close()


def _head(length: int | str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode()


LIES: dict[str, Callable[[ssl.SSLSocket], object]] = {
    "no end of the head": lambda link: link.sendall(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000),
    "no HTTP": lambda link: link.sendall(os.urandom(1 << 20) + b"\r\n\r\n"),
    "another length": lambda link: link.sendall(_head(1 << 50)),
    "no length": lambda link: link.sendall(b"HTTP/1.1 200 OK\r\n\r\n"),
    "an odd length": lambda link: link.sendall(_head("-1")),
    "hangs up": lambda link: link.close(),
    "a redirect": lambda link: link.sendall(
        b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/\r\nContent-Length: 0\r\n\r\n"
    ),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_hostile_endpoint_costs_nothing_but_a_try(
    bulk: NatsBulk, site: DirectSite, manifest: Manifest, lie: str
) -> None:
    hostile = Hostile(site.folder / "certificate.pem", lambda link: LIES[lie](link) and None)
    try:
        told = replace(manifest, direct=(DirectEndpoint(hostile.url, site.digest),))
        paths = site.paths(bulk)
        stats = await asyncio.wait_for(read(bulk, told, paths), 20)
        assert paths.known(SITE).barred_until_ms > 0
        assert stats.fetched_bytes < 1.05 * SIZE
    finally:
        hostile.close()
