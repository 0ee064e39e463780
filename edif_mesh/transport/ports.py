"""The doors of the mesh to its broker: what the shells may ask for, and nothing of NATS itself.

Adapters: `nats_bus.py` and `bulk.py` (the real ones) and `memory.py` (tests of shells that need no broker).
Every method raises only errors of `edif_mesh.errors` (`TransportError` and below) or `asyncio.CancelledError`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
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

    async def used_bytes(self, stream: str) -> int:
        """Return what the stream takes of its limit; raises NoReplyError, NotConnectedError."""

    async def subjects(self, stream: str, subject: str) -> dict[str, int]:
        """Return how many messages each subject under `subject` holds; what is missing from a transfer shows here."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """One stored message as a `Bulk` pushes it."""

    subject: str
    data: memoryview
    sequence: int


class Bulk(Protocol):
    """Large bytes to and from the streams, on a connection of their own; heals by itself."""

    async def store(
        self, subject: str, pieces: Sequence[bytes | memoryview], *, message_id: str, timeout_ms: int = 60_000
    ) -> bool:
        """Store the joined `pieces` as one message (at most 1 MiB) durably; repeats until `timeout_ms` have passed.

        Returns False when the write-once subject holds a message that did not come with this id. Raises StoreFullError,
        and NoReplyError or NotConnectedError when it is not known to be stored.
        """

    async def get(self, stream: str, subject: str) -> Arrived | None:
        """Return the last message of `subject`, or None; raises NoReplyError, NotConnectedError."""

    def push(self, stream: str, subject: str) -> AsyncGenerator[list[Arrived], None]:
        """Yield what `subject` holds, in order, in batches, for ever.

        Taking the next batch tells the broker to go on. An empty batch means that all there was has been given, that
        nothing came for a while, or that the link was lost and the push begins again behind the last message. Raises NotConnectedError when closed.
        """

    async def listen(
        self, subject: str, receiver: Callable[[str, memoryview], None], *, at_most: int
    ) -> Callable[[], None]:
        """Call `receiver(subject, data)` for the next `at_most` messages published there; best effort, lost on a cut.

        Returns how to stop sooner.
        """

    async def close(self) -> None:
        """Close; idempotent."""
