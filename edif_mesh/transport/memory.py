"""A broker in memory with the semantics of the real one, for tests of shells that need no server.

It passes the same contract tests as the NATS adapters. One event loop; nothing outlives the process.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edif_mesh.errors import NoReplyError, NotConnectedError, StoreFullError, TransportError
from edif_mesh.transport.ports import Arrived, Delivery, Handler, Incoming, Stored, Subscription
from edif_mesh.wire.subjects import StreamSpec

log = logging.getLogger(__name__)


class MemoryBroker:
    """What all memory buses and streams of a test share."""

    def __init__(self) -> None:
        self.subscriptions: list[_BusSubscription] = []
        self.streams: dict[str, _Stream] = {}
        self.changed = asyncio.Event()
        self._inboxes = 0

    def bus(self) -> MemoryBus:
        """Return a new connection's bus."""
        return MemoryBus(self)

    def durable(self) -> MemoryStreams:
        """Return a new connection's streams."""
        return MemoryStreams(self)

    def bulk(self) -> MemoryBulk:
        """Return a new bulk connection."""
        return MemoryBulk(self)

    def new_inbox(self) -> str:
        """Return a fresh subject for answers."""
        self._inboxes += 1
        return f"_INBOX.{self._inboxes}"

    def wipe(self) -> None:
        """Lose everything that was stored; streams that were ensured are made again, empty."""
        for name, stream in list(self.streams.items()):
            self.streams[name] = _Stream(stream.spec, stream.max_bytes)
        self.notify()

    def notify(self) -> None:
        """Wake everyone who waits for a message."""
        self.changed.set()
        self.changed = asyncio.Event()


class MemoryBus:
    """`ports.Bus` in memory; `cut()` and `heal()` play the link."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._listeners: list[Callable[[bool], None]] = []
        self._subscriptions: list[_BusSubscription] = []
        self._connected = True
        self._lost = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether the broker is connected now."""
        return self._connected

    def on_link(self, callback: Callable[[bool], None]) -> None:
        """Call `callback(connected)` on every loss and return of the link."""
        self._listeners.append(callback)

    def cut(self) -> None:
        """Lose the link; messages of that time are lost."""
        self._switch(False)
        self._lost.set()

    def heal(self) -> None:
        """Get the link back."""
        self._lost = asyncio.Event()
        self._switch(True)

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Send and forget; raises NotConnectedError while there is no link."""
        self._deliver(subject, data, reply)
        await asyncio.sleep(0)

    async def request(self, subject: str, data: bytes, *, timeout_ms: int) -> bytes:
        """Send and wait for one answer; raises NoReplyError, NotConnectedError."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def answered(message: Incoming) -> None:
            if not answer.done():
                answer.set_result(message.data)

        inbox = await self.subscribe(reply := self._broker.new_inbox(), answered)
        lost: asyncio.Future[object] = asyncio.ensure_future(self._lost.wait())
        try:
            if self._deliver(subject, data, reply) == 0:
                raise NoReplyError(f"Nobody listens on {subject}.")
            waiting: set[asyncio.Future[Any]] = {answer, lost}
            await asyncio.wait(waiting, timeout=timeout_ms / 1000, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if lost.done():
                raise NotConnectedError("The connection to the broker was lost.")
            raise NoReplyError(f"No answer on {subject} within {timeout_ms} ms.")
        finally:
            lost.cancel()
            await inbox.close()

    async def subscribe(self, subject: str, handler: Handler, *, concurrent: int = 1) -> Subscription:
        """Call `handler` for every message, at most `concurrent` at a time, in order of arrival when it is 1."""
        self._check()
        subscription = _BusSubscription(self, self._broker, subject, handler, concurrent)
        self._broker.subscriptions.append(subscription)
        self._subscriptions.append(subscription)
        return subscription

    async def close(self) -> None:
        """Close; idempotent."""
        self._connected = False
        self._lost.set()
        for subscription in self._subscriptions:
            await subscription.close()

    def _deliver(self, subject: str, data: bytes, reply: str) -> int:
        self._check()
        listeners = [s for s in self._broker.subscriptions if s.bus.connected and matches(s.subject, subject)]
        for subscription in listeners:
            subscription.queue.put_nowait(Incoming(subject, bytes(data), reply))
        return len(listeners)

    def _switch(self, connected: bool) -> None:
        if connected != self._connected:
            self._connected = connected
            for callback in list(self._listeners):
                callback(connected)

    def _check(self) -> None:
        if not self._connected:
            raise NotConnectedError("There is no connection to the broker; nothing was sent.")


class _BusSubscription:
    def __init__(self, bus: MemoryBus, broker: MemoryBroker, subject: str, handler: Handler, concurrent: int) -> None:
        self.bus, self.subject = bus, subject
        self.queue: asyncio.Queue[Incoming] = asyncio.Queue()
        self._broker, self._handler = broker, handler
        self._tasks = [asyncio.create_task(self._run()) for _ in range(concurrent)]

    async def close(self) -> None:
        if self in self._broker.subscriptions:
            self._broker.subscriptions.remove(self)
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _run(self) -> None:
        while True:
            message = await self.queue.get()
            try:
                await self._handler(message)
            except Exception:
                log.exception("handler failed", extra={"subject": message.subject})


@dataclass(slots=True)
class _Stream:
    spec: StreamSpec
    max_bytes: int
    messages: dict[int, Stored] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    last: int = 0
    size: int = 0
    consumers: dict[str, _Progress] = field(default_factory=dict)

    def remove(self, sequence: int) -> None:
        gone = self.messages.pop(sequence, None)
        if gone is not None:
            self.size -= len(gone.data)


@dataclass(slots=True)
class _Progress:
    """A durable consumer: what is done, and what must come again."""

    next: int = 1
    again: deque[int] = field(default_factory=deque)
    pending: set[int] = field(default_factory=set)


class MemoryStreams:
    """`ports.Streams` in memory."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._consumers: list[_Consumer] = []

    async def ensure(self, specs: Sequence[StreamSpec], *, max_bytes: dict[str, int]) -> None:
        """Create the streams that are missing and adjust the others."""
        for spec in specs:
            stream = self._broker.streams.setdefault(spec.name, _Stream(spec, max_bytes[spec.name]))
            stream.spec, stream.max_bytes = spec, max_bytes[spec.name]
        self._broker.notify()

    async def append(self, subject: str, data: bytes, *, message_id: str, timeout_ms: int = 5_000) -> int:
        """Store one message and return its sequence; a repeated id or a written-once subject keeps the first."""
        stream = await self.stream_of(subject)
        if message_id in stream.ids:
            return stream.ids[message_id]
        if stream.spec.one_message_a_subject:
            for stored in stream.messages.values():
                if stored.subject == subject:
                    return stored.sequence
        if stream.size + len(data) > stream.max_bytes:
            raise StoreFullError(f"The broker's store is full; nothing of {subject} was accepted.")
        stream.last += 1
        stream.messages[stream.last] = Stored(subject, bytes(data), stream.last)
        stream.ids[message_id] = stream.last
        stream.size += len(data)
        self._broker.notify()
        await asyncio.sleep(0)
        return stream.last

    async def get(self, stream: str, subject: str) -> Stored | None:
        """Return the last message of `subject`, or None."""
        found = [s for s in self._stream(stream).messages.values() if s.subject == subject]
        return found[-1] if found else None

    async def read(self, stream: str, subject: str, *, from_start: bool = True) -> AsyncIterator[Stored]:
        """Yield the messages of `subject` in order for ever; "new" begins with the first step of the iteration."""
        reading = self._stream(stream)
        after = 0 if from_start else reading.last
        while True:
            changed = self._broker.changed
            if self._stream(stream) is not reading:
                reading, after = self._stream(stream), 0
            for stored in list(reading.messages.values()):
                if stored.sequence > after and matches(subject, stored.subject):
                    after = stored.sequence
                    yield stored
            await changed.wait()

    async def consume(
        self, stream: str, durable: str, handler: Callable[[Delivery], Awaitable[None]], *, in_flight: int = 64
    ) -> Subscription:
        """Deliver every message of `stream` to `handler`, one after another, until it is `done`."""
        self._stream(stream)
        consumer = _Consumer(self._broker, stream, durable, handler, in_flight)
        self._consumers.append(consumer)
        return consumer

    async def purge(self, stream: str, subject: str) -> None:
        """Delete all messages of `subject`; silent when there are none."""
        found = self._broker.streams.get(stream)
        for stored in list(found.messages.values()) if found else ():
            if found and matches(subject, stored.subject):
                found.remove(stored.sequence)

    async def used_bytes(self, stream: str) -> int:
        """Return what the stream takes of its limit."""
        return self._stream(stream).size

    async def subjects(self, stream: str, subject: str) -> dict[str, int]:
        """Return how many messages each subject under `subject` holds."""
        counts: dict[str, int] = {}
        for stored in self._stream(stream).messages.values():
            if matches(subject, stored.subject):
                counts[stored.subject] = counts.get(stored.subject, 0) + 1
        return counts

    async def close(self) -> None:
        """Stop the consumers; idempotent."""
        for consumer in self._consumers:
            await consumer.close()

    def _stream(self, name: str) -> _Stream:
        if name not in self._broker.streams:
            raise TransportError(f"There is no stream {name}.")
        return self._broker.streams[name]

    async def stream_of(self, subject: str) -> _Stream:
        """Return the stream that takes `subject`; raises NoReplyError."""
        for stream in self._broker.streams.values():
            if matches(stream.spec.subject, subject):
                return stream
        raise NoReplyError(f"No stream takes {subject}.")


class MemoryBulk:
    """`ports.Bulk` in memory."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._streams = MemoryStreams(broker)
        self._bus = MemoryBus(broker)

    async def store(
        self, subject: str, pieces: Sequence[bytes | memoryview], *, message_id: str, timeout_ms: int = 60_000
    ) -> bool:
        """Store the joined `pieces`; False when the subject holds a message that did not come with this id."""
        stream = await self._streams.stream_of(subject)
        data = b"".join(pieces)
        sequence = await self._streams.append(subject, data, message_id=message_id, timeout_ms=timeout_ms)
        await self._bus.publish(subject, data)
        return stream.ids.get(message_id) == sequence

    async def get(self, stream: str, subject: str) -> Arrived | None:
        """Return the last message of `subject`, or None."""
        stored = await self._streams.get(stream, subject)
        return None if stored is None else Arrived(subject, memoryview(stored.data), stored.sequence)

    async def push(self, stream: str, subject: str) -> AsyncGenerator[list[Arrived], None]:
        """Yield what `subject` holds, one message a batch, empty ones when nothing comes."""
        reading = self._streams.read(stream, subject)
        following = asyncio.ensure_future(anext(reading))
        try:
            while True:
                done, _ = await asyncio.wait({following}, timeout=0.05)
                if not done:
                    yield []
                    continue
                stored, following = following.result(), asyncio.ensure_future(anext(reading))
                yield [Arrived(stored.subject, memoryview(stored.data), stored.sequence)]
        finally:
            following.cancel()

    async def listen(
        self, subject: str, receiver: Callable[[str, memoryview], None], *, at_most: int
    ) -> Callable[[], None]:
        """Call `receiver(subject, data)` for the next `at_most` messages published there."""
        left = at_most

        async def heard(message: Incoming) -> None:
            nonlocal left
            if left > 0:
                left -= 1
                receiver(message.subject, memoryview(message.data))

        await self._bus.subscribe(subject, heard)

        def stop() -> None:
            nonlocal left
            left = 0

        return stop

    async def close(self) -> None:
        """Close; idempotent."""
        await self._bus.close()


class _Consumer:
    def __init__(
        self, broker: MemoryBroker, stream: str, durable: str, handler: Callable[[Delivery], Awaitable[None]],
        in_flight: int,
    ) -> None:  # fmt: skip
        self._broker, self._stream, self._durable = broker, stream, durable
        self._handler, self._in_flight = handler, in_flight
        progress = self._progress()
        progress.again.extend(sorted(progress.pending))
        progress.pending.clear()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        self._task.cancel()

    def _progress(self) -> _Progress:
        return self._broker.streams[self._stream].consumers.setdefault(self._durable, _Progress())

    def _take(self) -> Stored | None:
        stream, progress = self._broker.streams[self._stream], self._progress()
        if len(progress.pending) >= self._in_flight:
            return None
        while progress.again:
            if (stored := stream.messages.get(progress.again.popleft())) is not None:
                return stored
        while progress.next <= stream.last:
            progress.next += 1
            if (stored := stream.messages.get(progress.next - 1)) is not None:
                return stored
        return None

    async def _run(self) -> None:
        while True:
            changed = self._broker.changed
            stored = self._take()
            if stored is None:
                await changed.wait()
                continue
            stream = self._broker.streams[self._stream]
            delivery = _Delivery(self._broker, stream, self._progress(), stored)
            try:
                await self._handler(delivery)
            except Exception:
                log.exception("handler failed", extra={"subject": stored.subject, "sequence": stored.sequence})
                await delivery.again(1_000)


class _Delivery:
    def __init__(self, broker: MemoryBroker, stream: _Stream, progress: _Progress, stored: Stored) -> None:
        self.subject, self.data, self.sequence = stored.subject, stored.data, stored.sequence
        self._broker, self._stream, self._progress = broker, stream, progress
        progress.pending.add(stored.sequence)

    async def done(self) -> None:
        self._progress.pending.discard(self.sequence)
        if self._stream.spec.work_queue:
            self._stream.remove(self.sequence)
        self._broker.notify()

    async def again(self, delay_ms: int = 0) -> None:
        asyncio.get_running_loop().call_later(delay_ms / 1000, self._return)

    def _return(self) -> None:
        if self.sequence in self._progress.pending:
            self._progress.pending.discard(self.sequence)
            self._progress.again.append(self.sequence)
            self._broker.notify()


def matches(pattern: str, subject: str) -> bool:
    """Return whether `subject` fits `pattern` (`*` one token, `>` the rest)."""
    wanted, given = pattern.split("."), subject.split(".")
    for number, token in enumerate(wanted):
        if token == ">":
            return len(given) > number
        if number >= len(given) or token not in ("*", given[number]):
            return False
    return len(wanted) == len(given)
