"""The link under fire: a broker killed with -9, restarted, wiped; a client that closed for good."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edif_mesh.domain.ids import JobId, KeyId
from edif_mesh.errors import NotConnectedError
from edif_mesh.transport.nats_bus import Connection, connect
from edif_mesh.transport.ports import Delivery, Incoming
from edif_mesh.wire import subjects
from tests.contract.nats_starter import NatsServer, link_is

MAX_BYTES = {spec.name: 64 << 20 for spec in subjects.STREAMS}
JOB = JobId("j0000000000000000000000a")
KEY = KeyId("a" * 32)


async def take(queue: asyncio.Queue, count: int) -> list:
    async with asyncio.timeout(20):
        return [await queue.get() for _ in range(count)]


async def test_an_unreachable_broker_is_a_sentence() -> None:
    with pytest.raises(NotConnectedError, match="cannot be reached"):
        await connect("nats://127.0.0.1:9", name="nobody", timeout_ms=700)


async def test_a_wrong_password_is_a_sentence(tmp_path: Path) -> None:
    server = NatsServer(tmp_path, extra='authorization { user: "a", password: "right" }')
    server.start()
    try:
        with pytest.raises(NotConnectedError, match="uthorization"):
            await connect(server.url, name="stranger", user="a", password="wrong", timeout_ms=1_000)
        good = await connect(server.url, name="friend", user="a", password="right")
        await good.close()
    finally:
        server.kill()


async def test_while_the_broker_is_away_nothing_is_buffered_and_everything_comes_back(
    server: NatsServer, connection: Connection
) -> None:
    seen: asyncio.Queue = asyncio.Queue()
    links: list[bool] = []
    connection.bus.on_link(links.append)

    async def handler(message: Incoming) -> None:
        await seen.put(message.data)

    async def silent(message: Incoming) -> None:
        await seen.put(b"asked")

    await connection.bus.subscribe("edif.v1.job.*.update", handler)
    await connection.bus.subscribe("edif.v1.ask", silent)
    question = asyncio.create_task(connection.bus.request("edif.v1.ask", b"", timeout_ms=60_000))
    await take(seen, 1)
    server.kill()
    with pytest.raises(NotConnectedError):
        await asyncio.wait_for(question, 15)
    await link_is(connection.bus, False)
    with pytest.raises(NotConnectedError):
        await connection.bus.publish("edif.v1.job.a.update", b"lost")
    server.start()
    await link_is(connection.bus, True)
    await connection.bus.publish("edif.v1.job.a.update", b"back")
    assert await take(seen, 1) == [b"back"]
    assert links == [False, True]


async def test_appends_during_kills_are_all_stored_once(server: NatsServer, connection: Connection) -> None:
    subject = subjects.log_lines(JOB, 1)

    async def append_all() -> None:
        for number in range(300):
            await connection.streams.append(subject, b"%d" % number, message_id=f"m{number}", timeout_ms=30_000)

    writing = asyncio.create_task(append_all())
    for _ in range(3):
        await asyncio.sleep(0.1)
        server.kill()
        server.start()
        await link_is(connection.bus, True)
    await asyncio.wait_for(writing, 60)
    found = []
    async for stored in connection.streams.read(subjects.LOGS_STREAM, subject):
        found.append(stored.data)
        if stored.data == b"299":
            break
    assert found == [b"%d" % n for n in range(300)]


async def test_an_append_in_the_moment_of_the_loss_leaves_the_client_time_to_notice_it(
    server: NatsServer, connection: Connection
) -> None:
    server.kill()
    while connection.bus.connected:  # noqa: ASYNC110 (no event: the moment before the loss is told is wanted)
        await asyncio.sleep(0)
    append = connection.streams.append(subjects.log_lines(JOB, 1), b"x", message_id="m", timeout_ms=10_000)
    writing = asyncio.create_task(append)
    await asyncio.sleep(0)
    server.start()
    assert await writing > 0


async def test_reading_and_consuming_go_on_after_a_kill_without_gap_or_repeat(
    server: NatsServer, connection: Connection
) -> None:
    read: asyncio.Queue = asyncio.Queue()
    consumed: asyncio.Queue = asyncio.Queue()
    lines = subjects.log_lines(JOB, 1)

    async def reading() -> None:
        async for stored in connection.streams.read(subjects.LOGS_STREAM, lines):
            await read.put(stored.data)

    async def handler(delivery: Delivery) -> None:
        await delivery.done()
        await consumed.put(delivery.data)

    task = asyncio.create_task(reading())
    await connection.streams.consume(subjects.ORDERS_STREAM, "coordinator", handler)
    for number in range(10):
        await connection.streams.append(lines, b"%d" % number, message_id=f"l{number}")
        await connection.streams.append(subjects.order(KEY), b"%d" % number, message_id=f"o{number}")
    assert await take(read, 10) == [b"%d" % n for n in range(10)]
    assert await take(consumed, 10) == [b"%d" % n for n in range(10)]
    server.kill()
    server.start()
    for number in range(10, 20):
        await connection.streams.append(lines, b"%d" % number, message_id=f"l{number}", timeout_ms=20_000)
        await connection.streams.append(subjects.order(KEY), b"%d" % number, message_id=f"o{number}", timeout_ms=20_000)
    assert await take(read, 10) == [b"%d" % n for n in range(10, 20)]
    wanted = {b"%d" % n for n in range(10, 20)}
    async with asyncio.timeout(20):
        while wanted:  # an acknowledgement may die with the broker: at least once, not exactly once
            wanted.discard(await consumed.get())
    task.cancel()


async def test_a_wiped_broker_gets_its_streams_and_consumers_again(server: NatsServer, connection: Connection) -> None:
    read: asyncio.Queue = asyncio.Queue()
    consumed: asyncio.Queue = asyncio.Queue()
    lines = subjects.log_lines(JOB, 1)

    async def reading() -> None:
        async for stored in connection.streams.read(subjects.LOGS_STREAM, lines):
            await read.put(stored.data)

    async def handler(delivery: Delivery) -> None:
        await delivery.done()
        await consumed.put(delivery.data)

    task = asyncio.create_task(reading())
    await connection.streams.consume(subjects.ORDERS_STREAM, "coordinator", handler)
    for number in range(5):
        await connection.streams.append(lines, b"before", message_id=f"l{number}")
    await take(read, 5)
    server.kill()
    server.wipe()
    server.start()
    await connection.streams.append(lines, b"after", message_id="l0", timeout_ms=20_000)
    await connection.streams.append(subjects.order(KEY), b"after", message_id="o", timeout_ms=20_000)
    assert await take(read, 1) == [b"after"]
    assert await take(consumed, 1) == [b"after"]
    task.cancel()


async def test_a_client_that_closed_for_good_is_replaced(server: NatsServer, connection: Connection) -> None:
    seen: asyncio.Queue = asyncio.Queue()

    async def handler(message: Incoming) -> None:
        await seen.put(message.data)

    await connection.bus.subscribe("edif.v1.job.*.update", handler)
    # What nats-py does by itself on an expired credential or a fatal `-ERR`.
    await connection.streams._link._client._process_err("'user authentication expired'")
    await link_is(connection.bus, False)
    await link_is(connection.bus, True)
    await connection.bus.publish("edif.v1.job.a.update", b"back")
    assert await take(seen, 1) == [b"back"]
