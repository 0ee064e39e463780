"""What every pair of Bus and Streams promises: the same tests for the broker in memory and a real nats-server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import pytest

from edif_mesh.domain.ids import JobId, KeyId
from edif_mesh.errors import NoReplyError, NotConnectedError, StoreFullError
from edif_mesh.transport.memory import MemoryBroker
from edif_mesh.transport.nats_bus import connect
from edif_mesh.transport.ports import Bus, Delivery, Incoming, Stored, Streams
from edif_mesh.wire import subjects
from tests.contract.nats_starter import NatsServer

MAX_BYTES = {spec.name: 64 << 20 for spec in subjects.STREAMS}
JOB = JobId("j0000000000000000000000a")
KEY = KeyId("a" * 32)


class Pair(Protocol):
    bus: Bus
    streams: Streams

    async def other(self) -> tuple[Bus, Streams]: ...


class MemoryPair:
    def __init__(self) -> None:
        self._broker = MemoryBroker()
        self.bus, self.streams = self._broker.bus(), self._broker.durable()

    async def other(self) -> tuple[Bus, Streams]:
        return self._broker.bus(), self._broker.durable()

    async def close(self) -> None:
        await self.streams.close()
        await self.bus.close()


class NatsPair:
    def __init__(self, server: NatsServer) -> None:
        self._server = server
        self._connections: list = []

    async def open(self) -> NatsPair:
        self.bus, self.streams = await self.other()
        return self

    async def other(self) -> tuple[Bus, Streams]:
        connection = await connect(self._server.url, name="contract")
        self._connections.append(connection)
        return connection.bus, connection.streams

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()
        self._server.kill()


@pytest.fixture(params=["memory", "nats"])
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    if request.param == "memory":
        opened = MemoryPair()
    else:
        server = NatsServer(tmp_path)
        server.start()
        opened = await NatsPair(server).open()
    await opened.streams.ensure(subjects.STREAMS, max_bytes=MAX_BYTES)
    yield opened
    await opened.close()


async def take(queue: asyncio.Queue, count: int) -> list:
    async with asyncio.timeout(15):
        return [await queue.get() for _ in range(count)]


async def read(streams: Streams, stream: str, subject: str, count: int) -> list[Stored]:
    found: list[Stored] = []
    async with asyncio.timeout(15):
        async for stored in streams.read(stream, subject):
            found.append(stored)
            if len(found) == count:
                break
    return found


async def test_a_request_gets_its_answer_and_fails_at_once_when_nobody_listens(pair: Pair) -> None:
    other, _ = await pair.other()

    async def answer(message: Incoming) -> None:
        await other.publish(message.reply, b"pong " + message.data)

    await other.subscribe("edif.v1.site.*.do", answer)
    await asyncio.sleep(0.05)
    assert await pair.bus.request("edif.v1.site.a.do", b"1", timeout_ms=5_000) == b"pong 1"
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(NoReplyError, match="Nobody listens"):
        await pair.bus.request("edif.v1.site.a.dont", b"1", timeout_ms=30_000)
    assert loop.time() - began < 15


async def test_a_silent_listener_is_a_no_reply_error(pair: Pair) -> None:
    async def silent(message: Incoming) -> None:
        pass

    await pair.bus.subscribe("edif.v1.ask", silent)
    with pytest.raises(NoReplyError, match="No answer"):
        await pair.bus.request("edif.v1.ask", b"", timeout_ms=100)


async def test_messages_arrive_in_order_and_a_failing_handler_loses_only_its_own(pair: Pair) -> None:
    seen: asyncio.Queue = asyncio.Queue()

    async def handler(message: Incoming) -> None:
        if message.data == b"3":
            raise ValueError("this one is poison")
        await seen.put(message.data)

    await pair.bus.subscribe("edif.v1.job.*.update", handler)
    for number in range(6):
        await pair.bus.publish(f"edif.v1.job.{number}.update", str(number).encode())
    assert await take(seen, 5) == [b"0", b"1", b"2", b"4", b"5"]


async def test_concurrent_handlers_overlap_up_to_the_limit(pair: Pair) -> None:
    gate, running, peak, seen = asyncio.Event(), 0, 0, asyncio.Queue()

    async def handler(message: Incoming) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        if peak == 3:
            gate.set()
        await asyncio.wait_for(gate.wait(), 10)
        await asyncio.sleep(0)
        running -= 1
        await seen.put(message.data)

    await pair.bus.subscribe("edif.v1.ask", handler, concurrent=3)
    for number in range(9):
        await pair.bus.publish("edif.v1.ask", str(number).encode())
    assert len(await take(seen, 9)) == 9
    assert peak == 3


async def test_a_closed_subscription_and_a_closed_bus_are_quiet(pair: Pair) -> None:
    seen: asyncio.Queue = asyncio.Queue()
    marks: asyncio.Queue = asyncio.Queue()

    async def handler(message: Incoming) -> None:
        await seen.put(message.data)

    async def mark(message: Incoming) -> None:
        await marks.put(message.data)

    subscription = await pair.bus.subscribe("edif.v1.ask", handler)
    await pair.bus.subscribe("edif.v1.*", mark)
    await subscription.close()
    await subscription.close()
    await pair.bus.publish("edif.v1.ask", b"late")
    await take(marks, 1)
    assert seen.empty()
    await pair.bus.close()
    await pair.bus.close()
    assert not pair.bus.connected
    with pytest.raises(NotConnectedError):
        await pair.bus.publish("edif.v1.ask", b"later")


async def test_an_append_is_stored_once_for_one_id(pair: Pair) -> None:
    subject = subjects.log_lines(JOB, 1)
    first = await pair.streams.append(subject, b"a", message_id="1")
    assert await pair.streams.append(subject, b"a", message_id="1") == first
    assert await pair.streams.append(subject, b"b", message_id="2") > first
    assert [s.data for s in await read(pair.streams, subjects.LOGS_STREAM, subject, 2)] == [b"a", b"b"]
    assert (await pair.streams.get(subjects.LOGS_STREAM, subject)).data == b"b"


async def test_a_write_once_subject_keeps_its_first_message(pair: Pair) -> None:
    subject = subjects.result_chunk(JOB, 1, 0)
    first = await pair.streams.append(subject, b"the first", message_id="1")
    assert await pair.streams.append(subject, b"another", message_id="2") == first
    stored = await pair.streams.get(subjects.RESULTS_STREAM, subject)
    assert stored is not None
    assert (stored.data, stored.sequence, stored.subject) == (b"the first", first, subject)


async def test_get_of_nothing_is_none_and_a_purge_of_nothing_is_silent(pair: Pair) -> None:
    assert await pair.streams.get(subjects.RESULTS_STREAM, subjects.result_chunk(JOB, 9, 0)) is None
    await pair.streams.purge(subjects.RESULTS_STREAM, subjects.result_chunks(JOB))


async def test_an_empty_message_is_a_message(pair: Pair) -> None:
    subject = subjects.payload_chunk(JOB, 0)
    await pair.streams.append(subject, b"", message_id="1")
    stored = await pair.streams.get(subjects.PAYLOADS_STREAM, subject)
    assert stored is not None
    assert stored.data == b""
    assert [s.data for s in await read(pair.streams, subjects.PAYLOADS_STREAM, subject, 1)] == [b""]


async def test_subjects_counts_and_purge_deletes_only_what_fits(pair: Pair) -> None:
    for number in range(3):
        for attempt in (1, 2):
            subject = subjects.result_chunk(JOB, attempt, number)
            await pair.streams.append(subject, b"x", message_id=subject)
    wanted = {subjects.result_chunk(JOB, 1, n): 1 for n in range(3)}
    assert await pair.streams.subjects(subjects.RESULTS_STREAM, subjects.result_chunks(JOB, 1)) == wanted
    await pair.streams.purge(subjects.RESULTS_STREAM, subjects.result_chunks(JOB, 1))
    assert await pair.streams.subjects(subjects.RESULTS_STREAM, subjects.result_chunks(JOB, 1)) == {}
    assert len(await pair.streams.subjects(subjects.RESULTS_STREAM, subjects.result_chunks(JOB))) == 3


async def test_read_gives_the_stored_and_then_the_new(pair: Pair) -> None:
    subject = subjects.log_lines(JOB, 1)
    await pair.streams.append(subject, b"0", message_id="0")
    await pair.streams.append(subjects.log_lines(JOB, 2), b"not ours", message_id="x")
    found: asyncio.Queue = asyncio.Queue()

    async def reading() -> None:
        async for stored in pair.streams.read(subjects.LOGS_STREAM, subject):
            await found.put(stored.data)

    task = asyncio.create_task(reading())
    assert await take(found, 1) == [b"0"]
    for number in range(1, 200):
        await pair.streams.append(subject, str(number).encode(), message_id=str(number))
    assert await take(found, 199) == [str(n).encode() for n in range(1, 200)]
    task.cancel()


async def test_read_of_new_ones_skips_the_stored(pair: Pair) -> None:
    subject = subjects.log_lines(JOB, 1)
    await pair.streams.append(subject, b"old", message_id="old")
    iterator = pair.streams.read(subjects.LOGS_STREAM, subject, from_start=False)
    step = asyncio.ensure_future(anext(iterator))
    for number in range(200):
        await pair.streams.append(subject, b"new", message_id=f"new {number}")
        await asyncio.sleep(0.01)
        if step.done():
            break
    assert (await asyncio.wait_for(step, 10)).data == b"new"
    await iterator.aclose()


async def test_a_consumer_gets_each_message_until_it_is_done(pair: Pair) -> None:
    seen: asyncio.Queue = asyncio.Queue()
    refused = set()

    async def handler(delivery: Delivery) -> None:
        if delivery.data == b"1" and delivery.sequence not in refused:
            refused.add(delivery.sequence)
            await delivery.again()
            return
        if delivery.data == b"2" and delivery.data not in refused:
            refused.add(delivery.data)
            raise ValueError("once")
        await delivery.done()
        await seen.put(delivery.data)

    await pair.streams.consume(subjects.ORDERS_STREAM, "coordinator", handler)
    for number in range(5):
        await pair.streams.append(subjects.order(KEY), str(number).encode(), message_id=str(number))
    assert sorted(await take(seen, 5)) == [b"0", b"1", b"2", b"3", b"4"]
    assert refused


async def test_what_was_not_done_comes_to_the_next_consumer_and_what_was_done_does_not(pair: Pair) -> None:
    seen: asyncio.Queue = asyncio.Queue()

    async def forgetful(delivery: Delivery) -> None:
        if delivery.data == b"0":
            await delivery.done()
        await seen.put(delivery.data)

    async def careful(delivery: Delivery) -> None:
        await delivery.done()
        await seen.put(delivery.data)

    for number in range(3):
        await pair.streams.append(subjects.order(KEY), str(number).encode(), message_id=str(number))
    first = await pair.streams.consume(subjects.ORDERS_STREAM, "coordinator", forgetful)
    assert await take(seen, 3) == [b"0", b"1", b"2"]
    await first.close()
    _, streams = await pair.other()
    await streams.consume(subjects.ORDERS_STREAM, "coordinator", careful)
    assert sorted(await take(seen, 2)) == [b"1", b"2"]
    assert seen.empty()


async def test_a_full_stream_refuses_in_a_sentence_and_keeps_what_it_has(pair: Pair) -> None:
    await pair.streams.ensure(subjects.STREAMS, max_bytes={**MAX_BYTES, subjects.PAYLOADS_STREAM: 300_000})
    data = b"x" * 100_000

    async def fill() -> None:
        for number in range(4):
            await pair.streams.append(subjects.payload_chunk(JOB, number), data, message_id=str(number))

    with pytest.raises(StoreFullError, match="store is full"):
        await fill()
    kept = await pair.streams.subjects(subjects.PAYLOADS_STREAM, subjects.payload_chunks(JOB))
    assert 2 <= len(kept) <= 3
    await pair.streams.ensure(subjects.STREAMS, max_bytes=MAX_BYTES)
    await pair.streams.append(subjects.payload_chunk(JOB, 9), data, message_id="9")
