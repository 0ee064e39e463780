"""The mesh's doors to a real NATS server: `connect()` gives a `NatsBus` and `NatsStreams` over one connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nats.aio.msg import Msg

from edif_mesh.errors import NotConnectedError
from edif_mesh.transport.nats_link import Access, Link, LinkSubscription
from edif_mesh.transport.nats_streams import NatsStreams
from edif_mesh.transport.ports import Handler, Incoming, Subscription

__all__ = ["Access", "Connection", "NatsBus", "NatsStreams", "connect"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection to the broker and its two doors."""

    bus: NatsBus
    streams: NatsStreams
    url: str
    access: Access

    async def close(self) -> None:
        """Flush what was published and close; idempotent."""
        await self.streams.close()
        await self.bus.close()


async def connect(
    url: str,
    *,
    name: str,
    user: str | None = None,
    password: str | None = None,
    token: str | None = None,
    credentials_file: Path | None = None,
    ca_file: Path | None = None,
    inbox_prefix: str = "_INBOX",
    timeout_ms: int = 10_000,
    on_closed: Callable[[], None] | None = None,
) -> Connection:
    """Connect to the broker at `url` and stay connected until `close()`, whatever happens to the broker.

    Raises:
        NotConnectedError: not reached within `timeout_ms`; the text says why.
    """
    access = Access(user, password, token, credentials_file, ca_file, inbox_prefix)
    link = Link(url, name, access, on_closed)
    await link.open(timeout_ms)
    return Connection(NatsBus(link), NatsStreams(link), url, access)


class NatsBus:
    """`ports.Bus` over one link."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @property
    def connected(self) -> bool:
        """Whether the broker is connected now."""
        return self._link.connected

    def on_link(self, callback: Callable[[bool], None]) -> None:
        """Call `callback(connected)` on every loss and return of the link."""
        self._link.on_link(callback)

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Send and forget; raises NotConnectedError while there is no link."""
        await self._link.publish(subject, data, reply=reply)

    async def request(self, subject: str, data: bytes, *, timeout_ms: int) -> bytes:
        """Send and wait for one answer; raises NoReplyError, NotConnectedError."""
        answer = await self._link.ask(subject, data, timeout_ms)
        return bytes(answer.data)

    async def subscribe(self, subject: str, handler: Handler, *, concurrent: int = 1) -> Subscription:
        """Call `handler` for every message, at most `concurrent` at a time, in order of arrival when it is 1."""
        if not self._link.connected:
            raise NotConnectedError("There is no connection to the broker.")
        runner = HandlerRunner(handler, concurrent)
        return _BusSubscription(await self._link.subscribe(subject, runner.received), runner)

    async def close(self) -> None:
        """Flush what was published and close; idempotent."""
        await self._link.close()


class HandlerRunner:
    """Runs a handler for each message, `concurrent` at a time; an exception is logged and ends only that message."""

    def __init__(self, handler: Handler, concurrent: int) -> None:
        self._handler = handler
        self._room = asyncio.Semaphore(concurrent) if concurrent > 1 else None
        self._tasks: set[asyncio.Task[None]] = set()

    async def received(self, message: Msg) -> None:
        """Handle one message, or start to once there is room."""
        incoming = Incoming(message.subject, message.data, message.reply)
        if self._room is None:
            await self._handle(incoming)
            return
        await self._room.acquire()
        task = asyncio.create_task(self._handle(incoming))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._room.release() if self._room else None)

    async def _handle(self, incoming: Incoming) -> None:
        try:
            await self._handler(incoming)
        except Exception:
            log.exception("handler failed", extra={"subject": incoming.subject})

    def stop(self) -> None:
        """Cancel the handlers that still run."""
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()


class _BusSubscription:
    def __init__(self, subscription: LinkSubscription, runner: HandlerRunner) -> None:
        self._subscription, self._runner = subscription, runner

    async def close(self) -> None:
        await self._subscription.close()
        self._runner.stop()
