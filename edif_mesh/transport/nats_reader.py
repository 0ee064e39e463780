"""Reads a stream in order and without gaps, through lost links and restarted, even wiped, brokers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from nats.aio.msg import Msg

from edif_mesh.errors import TransportError
from edif_mesh.transport.nats_link import Link, LinkSubscription, ack_numbers
from edif_mesh.transport.ports import Stored

log = logging.getLogger(__name__)

HEARTBEAT_MS = 1_000
_SILENCE_S = 2.5 * HEARTBEAT_MS / 1000
_RETRY_S = 0.25
_AGAIN = object()


class OrderedReader:
    """An ephemeral push consumer with flow control, made anew at the next sequence whenever a message is missed."""

    def __init__(self, link: Link, stream: str, subject: str, *, from_start: bool) -> None:
        self._link, self._stream, self._subject = link, stream, subject
        self._from_start = from_start
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._subscription: LinkSubscription | None = None
        self._stop_listening: Callable[[], None] = lambda: None
        self._round = 0
        self._delivered = 0
        self._next = 1
        self._created = ""
        self._running = False

    async def next(self) -> Stored:
        """Return the next message; waits for ever. Errors of the broker are retried."""
        while True:
            if not self._running:
                await self._restart()
            try:
                async with asyncio.timeout(_SILENCE_S):
                    item = await self._queue.get()
            except TimeoutError:
                self._running = False
                continue
            stored = await self._accept(item)
            if stored is not None:
                return stored

    async def close(self) -> None:
        """Delete the consumer by giving up its subject; the server forgets it by itself."""
        self._stop_listening()
        if self._subscription is not None:
            await self._subscription.close()
            self._subscription = None

    async def _restart(self) -> None:
        """Make a consumer that begins at the next wanted sequence; retried until it succeeds."""
        while True:
            try:
                await self._link.wait_connected(60_000)
                await self._create()
                return
            except TransportError as error:
                log.debug("reader waits", extra={"stream": self._stream, "reason": str(error)})
                await asyncio.sleep(_RETRY_S)

    async def _create(self) -> None:
        info = await self._link.api(f"STREAM.INFO.{self._stream}", {})
        if self._created and info["created"] != self._created:
            self._next = 1  # another stream under the same name: its numbers begin again
        elif not self._created and not self._from_start:
            self._next = int(info["state"]["last_seq"]) + 1
        self._created = info["created"]
        await self.close()
        self._round += 1
        self._delivered = 0
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._queue = queue
        inbox = self._link.new_inbox()

        async def received(message: Msg) -> None:
            queue.put_nowait(message)

        self._subscription = await self._link.subscribe(inbox, received)
        self._stop_listening = self._link.on_link(lambda connected: queue.put_nowait(_AGAIN) if connected else None)
        config = {
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self._next,
            "filter_subject": self._subject,
            "deliver_subject": inbox,
            "ack_policy": "none",
            "max_deliver": 1,
            "flow_control": True,
            "idle_heartbeat": HEARTBEAT_MS * 1_000_000,
            "inactive_threshold": 10_000_000_000,
            "mem_storage": True,
            "num_replicas": 1,
            "replay_policy": "instant",
        }
        await self._link.api(f"CONSUMER.CREATE.{self._stream}", {"stream_name": self._stream, "config": config})
        self._running = True

    async def _accept(self, item: Any) -> Stored | None:
        if item is _AGAIN:
            self._running = False
            return None
        message: Msg = item
        headers = message.headers or {}
        if not message.data and headers.get("Status") == "100":
            await self._control(message, headers)
            return None
        if not message.data and headers.get("Status"):
            self._running = False  # 409: the consumer was deleted
            return None
        sequence, delivered = ack_numbers(message.reply)
        if delivered != self._delivered + 1:
            self._running = False
            return None
        self._delivered = delivered
        self._next = sequence + 1
        return Stored(message.subject, bytes(message.data), sequence)

    async def _control(self, message: Msg, headers: dict[str, str]) -> None:
        """Answer flow control; a heartbeat that counts more than we have means a gap."""
        try:
            if message.reply:
                await self._link.publish(message.reply, b"")
                return
            if stalled := headers.get("Nats-Consumer-Stalled"):
                await self._link.publish(stalled, b"")
        except TransportError:
            self._running = False
        if int(headers.get("Nats-Last-Consumer", self._delivered)) > self._delivered:
            self._running = False
