"""A broker that tests kill, and a connection to it; `MAX_BYTES` of the test's module bounds its streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edif_mesh.transport.nats_bus import Connection, connect
from edif_mesh.wire import subjects
from tests.contract.nats_starter import NatsServer


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    server = NatsServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def connection(server: NatsServer, request: pytest.FixtureRequest) -> AsyncIterator[Connection]:
    connection = await connect(server.url, name="fault")
    await connection.streams.ensure(subjects.STREAMS, max_bytes=request.module.MAX_BYTES)
    yield connection
    await connection.close()
