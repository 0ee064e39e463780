"""A durable pull consumer that pulls again at once after a cut, and is made anew on a broker that lost it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from nats.aio.msg import Msg

from edif_mesh.errors import TransportError
from edif_mesh.transport.nats_link import Link, LinkSubscription, ack_numbers, status_of
from edif_mesh.transport.ports import Delivery

log = logging.getLogger(__name__)

ACK_WAIT_MS = 5_000
"""A delivery that a dead process held comes again after this; longer handling only repeats a message."""
_PULL_MS = 4_000
_RETRY_S = 0.25


class DurableConsumer:
    """Pulls from one durable consumer and hands the messages to one handler in order."""

    def __init__(
        self, link: Link, stream: str, durable: str, handler: Callable[[Delivery], Awaitable[None]], in_flight: int
    ) -> None:
        self._link, self._stream, self._durable = link, stream, durable
        self._handler, self._in_flight = handler, in_flight
        self._queue: asyncio.Queue[Msg] = asyncio.Queue()
        self._wake = asyncio.Event()
        self._subscription: LinkSubscription | None = None
        self._inbox = ""
        self._tasks: list[asyncio.Task[None]] = []
        self._pull = 0
        self._wanted = 0
        self._stop_listening: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Create the consumer (raises TransportError when that fails) and begin to pull."""
        await self._create()
        self._inbox = self._link.new_inbox()
        self._subscription = await self._link.subscribe(f"{self._inbox}.*", self._received)
        self._stop_listening = self._link.on_link(self._on_link)
        self._tasks = [asyncio.create_task(self._pulling()), asyncio.create_task(self._handling())]

    async def close(self) -> None:
        """Stop receiving; what was not `done` is delivered again to the next one. Idempotent."""
        self._stop_listening()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        self._tasks = []
        if self._subscription is not None:
            await self._subscription.close()

    async def _create(self) -> None:
        config = {
            "durable_name": self._durable,
            "name": self._durable,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": ACK_WAIT_MS * 1_000_000,
            "max_ack_pending": self._in_flight,
            "max_deliver": -1,
            "replay_policy": "instant",
        }
        request = {"stream_name": self._stream, "config": config, "action": ""}
        await self._link.api(f"CONSUMER.CREATE.{self._stream}.{self._durable}", request)

    def _on_link(self, connected: bool) -> None:
        if connected:
            self._wanted = 0
            self._wake.set()

    async def _pulling(self) -> None:
        """Keep one pull open; a new one when it is used up, has expired, or was lost with the link."""
        while True:
            try:
                if not await self._link.wait_connected(60_000):
                    continue
                self._pull, self._wanted = self._pull + 1, self._in_flight
                self._wake.clear()
                request = b'{"batch":%d,"expires":%d}' % (self._in_flight, _PULL_MS * 1_000_000)
                subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._durable}"
                await self._link.publish(subject, request, reply=f"{self._inbox}.{self._pull}")
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PULL_MS / 1000 + 0.5):
                        await self._wake.wait()
            except TransportError as error:
                log.warning("pull failed", extra={"consumer": self._durable, "reason": str(error)})
                await asyncio.sleep(_RETRY_S)

    async def _received(self, message: Msg) -> None:
        status = status_of(message)
        current = message.subject.rpartition(".")[2] == str(self._pull)  # of a status; data keeps its own subject
        if not status:
            await self._queue.put(message)
            self._wanted -= 1
            if self._wanted <= 0:
                self._wake.set()
        elif status == "503" or (status == "409" and "Deleted" in str((message.headers or {}).get("Description"))):
            await self._recreate()
        elif status in {"404", "408", "409"} and current:
            self._wake.set()

    async def _recreate(self) -> None:
        try:
            await self._create()
            log.info("consumer made anew", extra={"consumer": self._durable})
        except TransportError as error:
            log.warning("consumer not made yet", extra={"consumer": self._durable, "reason": str(error)})
            await asyncio.sleep(_RETRY_S)
        self._wake.set()

    async def _handling(self) -> None:
        while True:
            delivery = NatsDelivery(self._link, await self._queue.get())
            try:
                await self._handler(delivery)
            except Exception:
                log.exception("handler failed", extra={"subject": delivery.subject, "sequence": delivery.sequence})
                with suppress(TransportError):
                    await delivery.again(1_000)


class NatsDelivery:
    """One durable message on its way."""

    def __init__(self, link: Link, message: Msg) -> None:
        self._link, self._reply = link, message.reply
        self.subject, self.data = message.subject, bytes(message.data)
        self.sequence = ack_numbers(message.reply)[0]

    async def done(self) -> None:
        """It has been recorded; an acknowledgement that is lost with the link only repeats the message."""
        with suppress(TransportError):
            await self._link.publish(self._reply, b"+ACK")

    async def again(self, delay_ms: int = 0) -> None:
        """Deliver it again after `delay_ms`."""
        with suppress(TransportError):
            await self._link.publish(self._reply, b'-NAK {"delay":%d}' % (delay_ms * 1_000_000))
