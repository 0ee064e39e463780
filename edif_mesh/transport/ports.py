"""The doors of the mesh to its broker: what the shells may ask for, and nothing of NATS itself.

Adapters: `nats_bus.py` (the real one) and `memory.py` (tests of shells that need no broker).
Every method raises only errors of `edif_mesh.errors` (`TransportError` and below) or `asyncio.CancelledError`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edif_mesh.wire.subjects import StreamSpec


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message as it arrived; `reply` is empty when no answer is wanted."""

    subject: str
    data: bytes
    reply: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """One message of a stream; `sequence` is the stream's own number."""

    subject: str
    data: bytes
    sequence: int


Handler = Callable[[Incoming], Awaitable[None]]


class Subscription(Protocol):
    """A running subscription."""

    async def close(self) -> None:
        """Stop receiving; idempotent."""


class Delivery(Protocol):
    """One durable message on its way to a consumer: exactly one of `done` and `again` must be called."""

    subject: str
    data: bytes
    sequence: int

    async def done(self) -> None:
        """It has been recorded; never deliver it again."""

    async def again(self, delay_ms: int = 0) -> None:
        """Deliver it again after `delay_ms`."""


class Bus(Protocol):
    """Core messaging: at most once, fast; the ends repeat what matters until it is answered."""

    @property
    def connected(self) -> bool:
        """Whether the broker is connected now."""

    def on_link(self, callback: Callable[[bool], None]) -> None:
        """Call `callback(connected)` on every loss and return of the link."""

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Send and forget. Raises NotConnectedError while there is no link (nothing is buffered)."""

    async def request(self, subject: str, data: bytes, *, timeout_ms: int) -> bytes:
        """Send and wait for one answer. Raises NoReplyError (also at once when nobody listens), NotConnectedError."""

    async def subscribe(self, subject: str, handler: Handler, *, concurrent: int = 1) -> Subscription:
        """Call `handler` for every message, at most `concurrent` at a time, in order of arrival when it is 1.

        The subscription survives reconnects. An exception of the handler is logged and ends only that message.
        """

    async def close(self) -> None:
        """Flush what was published and close; idempotent."""


class Streams(Protocol):
    """Durable messaging on the streams of `wire.subjects.STREAMS`."""

    async def ensure(self, specs: Sequence[StreamSpec], *, max_bytes: dict[str, int]) -> None:
        """Create the streams that are missing and adjust the others; safe to repeat, also after a broker was wiped."""

    async def append(self, subject: str, data: bytes, *, message_id: str, timeout_ms: int = 5_000) -> int:
        """Store one message durably and return its sequence. Retries inside `timeout_ms`; the same `message_id` within
        the duplicate window is stored once, and a subject of a write-once stream keeps its first message.

        Raises StoreFullError when the stream's limit is reached, NoReplyError when it is not known to be stored.
        """

    async def get(self, stream: str, subject: str) -> Stored | None:
        """Return the last message of `subject`, or None."""

    def read(self, stream: str, subject: str, *, from_start: bool = True) -> AsyncIterator[Stored]:
        """Yield the messages of `subject` (wildcards allowed) in order, first the stored ones, then new ones, for ever.

        Gaps after a reconnect are filled; nothing is yielded twice.
        """

    async def consume(
        self, stream: str, durable: str, handler: Callable[[Delivery], Awaitable[None]], *, in_flight: int = 64
    ) -> Subscription:
        """Deliver every message of `stream` to `handler` until it is `done`, across restarts of both ends."""

    async def purge(self, stream: str, subject: str) -> None:
        """Delete all messages of `subject`; silent when there are none."""

    async def subjects(self, stream: str, subject: str) -> dict[str, int]:
        """Return how many messages each subject under `subject` holds; what is missing from a transfer shows here."""
