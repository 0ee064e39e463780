"""One connection to a NATS server that heals itself: what the bus and the streams share.

nats-py reconnects, but buffers silently, drops answers that were under way, and closes for good on some server errors.
Here nothing is sent while there is no link, every open question fails at once when the link is lost, and a client that
closed for good is replaced, its subscriptions with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from edif_mesh.errors import NobodyListensError, NoReplyError, NotConnectedError, TransportError

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 1 << 20
"""The broker's default limit; nothing of ours is larger."""
_NATS_ERRORS = (nats.errors.Error, OSError)


@dataclass(frozen=True, slots=True)
class Access:
    """How a connection proves itself to the broker; empty for an open one."""

    user: str | None = None
    password: str | None = None
    token: str | None = None
    credentials_file: Path | None = None
    """A NATS `.creds` file (needs the package `nkeys`); the bulk connection does not support it."""
    ca_file: Path | None = None
    """Certificates that the server's own must chain to; None means the system's, where the server asks for TLS."""
    inbox_prefix: str = "_INBOX"

    def tls(self, url: str) -> ssl.SSLContext | None:
        """Return the TLS context for `url`, or None where none is configured."""
        if self.ca_file is not None:
            return ssl.create_default_context(cafile=str(self.ca_file))
        return ssl.create_default_context() if url.startswith(("tls:", "wss:")) else None


class Link:
    """A self-healing nats-py client with its own answer table. All methods belong to one event loop."""

    def __init__(self, url: str, name: str, access: Access, on_closed: Callable[[], None] | None) -> None:
        self.url, self.name, self.access = url, name, access
        self._on_closed = on_closed
        self._client = Client()
        self._listeners: list[Callable[[bool], None]] = []
        self._subscriptions: set[LinkSubscription] = set()
        self._open: dict[str, asyncio.Future[Msg]] = {}
        self._asked = 0
        self._answers = ""
        self._back = asyncio.Event()
        self._closing = False
        self._told_at = 0.0
        self._watcher: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether the broker is connected now."""
        return self._back.is_set() and bool(self._client.is_connected)

    def on_link(self, callback: Callable[[bool], None]) -> Callable[[], None]:
        """Call `callback(connected)` on every loss and return of the link; returns how to stop that."""
        self._listeners.append(callback)

        def stop() -> None:
            with suppress(ValueError):
                self._listeners.remove(callback)

        return stop

    async def open(self, timeout_ms: int) -> None:
        """Connect, or raise NotConnectedError that says why within `timeout_ms`."""
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await self._start(self._client)
        except (TimeoutError, *_NATS_ERRORS) as error:
            self._closing = True
            reason = self._client.last_error or error
            await self._abandon(self._client)
            raise NotConnectedError(f"The broker at {self.url} cannot be reached: {reason}.") from error
        self._watcher = asyncio.create_task(self._watch(), name=f"link-watch {self.name}")

    async def close(self) -> None:
        """Flush what was published and close; idempotent."""
        if self._closing:
            return
        self._closing = True
        if self._watcher is not None:
            self._watcher.cancel()
        if self._client.is_connected:
            with suppress(*_NATS_ERRORS, TimeoutError):
                await self._client.flush(2)
        await self._abandon(self._client)
        self._lost()
        if self._on_closed is not None:
            self._on_closed()

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Hand one message to the socket; raises NotConnectedError, or TransportError for one that is too large."""
        if not self.connected:
            raise NotConnectedError(f"There is no connection to the broker at {self.url}; nothing was sent.")
        try:
            await self._client.publish(subject, data, reply, headers)
        except nats.errors.MaxPayloadError as error:
            raise TransportError(f"A message of {len(data)} bytes is over the broker's limit.") from error
        except _NATS_ERRORS as error:
            raise NotConnectedError(f"The connection to the broker at {self.url} failed: {error}.") from error

    async def ask(self, subject: str, data: bytes, timeout_ms: int, headers: dict[str, str] | None = None) -> Msg:
        """Publish and return the first answer. Raises NoReplyError, NotConnectedError (also when the link is lost)."""
        self._asked += 1
        token = f"{self._asked:x}"
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._open[token] = future
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await self.publish(subject, data, reply=f"{self._answers}.{token}", headers=headers)
                answer = await future
        except TimeoutError as error:
            raise NoReplyError(f"No answer on {subject} within {timeout_ms} ms.") from error
        finally:
            self._open.pop(token, None)
            if not future.cancel() and not future.cancelled():
                future.exception()  # it counts as seen
        if status_of(answer) == "503":
            raise NobodyListensError(f"Nobody listens on {subject}.")
        return answer

    async def api(self, name: str, request: dict[str, Any], timeout_ms: int = 5_000) -> dict[str, Any]:
        """Ask JetStream's API `name` and return its answer; raises ApiError for an error, and as `ask` does."""
        data = json.dumps(request).encode() if request else b""
        answer = await self.ask(f"$JS.API.{name}", data, timeout_ms)
        value: dict[str, Any] = json.loads(answer.data)
        if "error" in value:
            raise ApiError.of(value["error"])
        return value

    async def wait_connected(self, timeout_ms: int) -> bool:
        """Wait until there is a link; returns whether there is."""
        if self.connected:
            return True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_ms / 1000):
                while not self.connected:
                    await self._back.wait()
                    # The client may know of a loss before it has told us; it needs the event loop to do so.
                    await asyncio.sleep(0 if self.connected else 0.01)
        return self.connected

    async def subscribe(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> LinkSubscription:
        """Call `callback` for every message, one after another; survives reconnects and replaced clients."""
        subscription = LinkSubscription(self, subject, callback)
        self._subscriptions.add(subscription)
        await subscription.start(self._client)
        return subscription

    def new_inbox(self) -> str:
        """Return a fresh subject for answers, which may be extended by a dot and more."""
        return str(self._client.new_inbox())

    def forget(self, subscription: LinkSubscription) -> None:
        """Do not renew this subscription any more."""
        self._subscriptions.discard(subscription)

    # ------------------------------------------------------------------------------------------ the client's life

    async def _start(self, client: Client) -> None:
        options: dict[str, Any] = {}
        if (context := self.access.tls(self.url)) is not None:
            options["tls"] = context
        if self.access.credentials_file is not None:
            options["user_credentials"] = str(self.access.credentials_file)
        await client.connect(
            self.url, name=self.name, user=self.access.user, password=self.access.password, token=self.access.token,
            inbox_prefix=self.access.inbox_prefix, error_cb=self._heard, disconnected_cb=self._on_lost,
            reconnected_cb=self._on_back, closed_cb=self._on_lost, max_reconnect_attempts=-1, reconnect_time_wait=0.2,
            connect_timeout=2, ping_interval=5, max_outstanding_pings=2, flush_timeout=10, **options,
        )  # fmt: skip
        self._answers = client.new_inbox()
        await client.subscribe(f"{self._answers}.*", cb=self._answered)
        for subscription in list(self._subscriptions):
            await subscription.start(client)
        await client.flush(2)
        self._back.set()

    async def _watch(self) -> None:
        """Replace a client that closed for good, or whose reconnecting ended without a connection."""
        while not self._closing:
            await asyncio.sleep(0.5)
            task = self._client._reconnection_task
            stuck = self._client.is_reconnecting and task is not None and task.done()
            if not (self._client.is_closed or stuck):
                continue
            log.warning("broker client replaced", extra={"reason": str(self._client.last_error)})
            self._lost()
            await self._abandon(self._client)
            fresh = Client()
            try:
                async with asyncio.timeout(5):
                    await self._start(fresh)
            except (TimeoutError, NotConnectedError, *_NATS_ERRORS):
                await self._abandon(fresh)
                continue
            self._client = fresh
            self._tell(True)

    async def _abandon(self, client: Client) -> None:
        with suppress(Exception):
            async with asyncio.timeout(1):
                await client.close()

    async def _answered(self, message: Msg) -> None:
        future = self._open.pop(message.subject.rpartition(".")[2], None)
        if future is not None and not future.done():
            future.set_result(message)

    async def _on_lost(self) -> None:
        self._lost()

    async def _on_back(self) -> None:
        self._back.set()
        log.info("broker link back", extra={"broker": self.url})
        self._tell(True)

    def _lost(self) -> None:
        was = self._back.is_set()
        self._back.clear()
        for future in self._open.values():
            if not future.done():
                future.set_exception(NotConnectedError(f"The connection to the broker at {self.url} was lost."))
        if was:
            if not self._closing:
                log.warning("broker link lost", extra={"broker": self.url})
            self._tell(False)

    def _tell(self, connected: bool) -> None:
        for callback in list(self._listeners):
            try:
                callback(connected)
            except Exception:
                log.exception("link listener failed")

    async def _heard(self, error: Exception) -> None:
        """Log what nats-py reports; while the broker is away only every tenth second."""
        quiet = isinstance(error, OSError | nats.errors.UnexpectedEOF)
        if quiet and time.monotonic() - self._told_at < 10:
            return
        self._told_at = time.monotonic() if quiet else self._told_at
        log.warning("broker client error", extra={"error": f"{type(error).__name__}: {error}"})


class LinkSubscription:
    """A subscription that follows the link from client to client."""

    def __init__(self, link: Link, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> None:
        self._link, self._subject, self._callback = link, subject, callback
        self._current: Any = None

    async def start(self, client: Client) -> None:
        """Subscribe at `client`."""

        async def received(message: Msg) -> None:
            await self._callback(message)

        try:
            self._current = await client.subscribe(self._subject, cb=received)
        except _NATS_ERRORS as error:
            raise NotConnectedError(f"Cannot subscribe to {self._subject}: {error}.") from error

    async def close(self) -> None:
        """Stop receiving; idempotent."""
        self._link.forget(self)
        current, self._current = self._current, None
        if current is not None:
            with suppress(*_NATS_ERRORS):
                await current.unsubscribe()


class ApiError(TransportError):
    """JetStream answered with an error; `number` is its stable `err_code`."""

    def __init__(self, number: int, text: str) -> None:
        self.number = number
        super().__init__(f"The broker refused: {text} ({number}).")

    @classmethod
    def of(cls, error: dict[str, Any]) -> ApiError:
        """Return the error in a JetStream answer."""
        return cls(int(error.get("err_code", error.get("code", 0))), str(error.get("description", "no reason")))


def status_of(message: Msg) -> str:
    """Return the NATS status of a message without data (`503`: nobody listens, `404`, `408`, ...), else ''."""
    headers = message.headers
    return str(headers.get("Status", "")) if headers and not message.data else ""


def ack_numbers(reply: str) -> tuple[int, int]:
    """Return the stream's and the consumer's sequence from an acknowledgement subject (`$JS.ACK...`, ADR-15)."""
    parts = reply.split(".")
    first = 5 if len(parts) == 9 else 7  # with a domain, two tokens more
    return int(parts[first]), int(parts[first + 1])
