"""`ports.Streams` over JetStream, asked through its plain JSON API.

nats-py's own JetStream context is not used: its consumers lose a pull on a cut, its ordered consumer knows no wiped
broker, and its answers cannot tell "already stored" from "full".
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from edif_mesh.errors import NoReplyError, NotConnectedError, StoreFullError, TransportError
from edif_mesh.transport.nats_consumer import DurableConsumer
from edif_mesh.transport.nats_link import ApiError, Link, status_of
from edif_mesh.transport.nats_reader import OrderedReader
from edif_mesh.transport.ports import Delivery, Stored, Subscription
from edif_mesh.wire.subjects import StreamSpec

log = logging.getLogger(__name__)

DUPLICATE_WINDOW_MS = 120_000
"""At least as long as anyone repeats a publish."""
STREAM_NOT_FOUND = 10059
_NAME_IN_USE = 10058
_WRITE_FAILED = 10077
"""The store's own words decide: `maximum bytes exceeded`, `maximum messages per subject exceeded`, ..."""
_FULL = (10023, 10028, 10047)
_TRY_MS = 2_000


class NatsStreams:
    """Durable messaging over one link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._ensured: tuple[tuple[StreamSpec, ...], dict[str, int]] | None = None
        self._consumers: set[DurableConsumer] = set()
        self._repair: asyncio.Task[None] | None = None
        link.on_link(self._on_link)

    async def ensure(self, specs: Sequence[StreamSpec], *, max_bytes: dict[str, int]) -> None:
        """Create the streams that are missing and adjust the others.

        From then on it is repeated by itself whenever the link returns, since the broker may come back without data.
        """
        for spec in specs:
            await self._ensure_one(spec, max_bytes[spec.name])
        self._ensured = (tuple(specs), dict(max_bytes))

    async def append(self, subject: str, data: bytes, *, message_id: str, timeout_ms: int = 5_000) -> int:
        """Store one message durably and return its sequence; see `ports.Streams.append` for the promises and errors."""
        deadline = time.monotonic() + timeout_ms / 1000
        last: TransportError = NoReplyError(f"Storing on {subject} got no time at all.")
        while (left_ms := int((deadline - time.monotonic()) * 1000)) > 0:
            if not await self._link.wait_connected(left_ms):
                last = NotConnectedError(f"There is no connection to the broker at {self._link.url}.")
                continue
            try:
                answer = await self._link.ask(subject, data, min(left_ms, _TRY_MS), {"Nats-Msg-Id": message_id})
                return await self._stored(subject, json.loads(answer.data))
            except (NoReplyError, NotConnectedError) as error:
                last = error
                await asyncio.sleep(0.1)
        raise last

    async def get(self, stream: str, subject: str) -> Stored | None:
        """Return the last message of `subject`, or None."""
        answer = await self._link.ask(f"$JS.API.DIRECT.GET.{stream}.{subject}", b"", 5_000)
        headers = answer.headers or {}
        if status_of(answer) == "404":
            return None
        if "Nats-Sequence" not in headers:
            raise TransportError(f"The broker did not give {subject}: {headers.get('Description', 'no reason')}.")
        return Stored(str(headers["Nats-Subject"]), bytes(answer.data), int(headers["Nats-Sequence"]))

    async def read(self, stream: str, subject: str, *, from_start: bool = True) -> AsyncIterator[Stored]:
        """Yield the messages of `subject` in order for ever; "new" begins with the first step of the iteration."""
        reader = OrderedReader(self._link, stream, subject, from_start=from_start)
        try:
            while True:
                yield await reader.next()
        finally:
            await reader.close()

    async def consume(
        self, stream: str, durable: str, handler: Callable[[Delivery], Awaitable[None]], *, in_flight: int = 64
    ) -> Subscription:
        """Deliver every message of `stream` to `handler`, one after another, until it is `done`.

        A handler that raises is logged and gets the message again after a second.
        """
        consumer = DurableConsumer(self._link, stream, durable, handler, in_flight)
        self._consumers.add(consumer)
        await consumer.start()
        return consumer

    async def purge(self, stream: str, subject: str) -> None:
        """Delete all messages of `subject`; silent when there are none."""
        try:
            await self._link.api(f"STREAM.PURGE.{stream}", {"filter": subject})
        except ApiError as error:
            if error.number != STREAM_NOT_FOUND:
                raise

    async def used_bytes(self, stream: str) -> int:
        """Return what the stream takes of its limit."""
        return int((await self._link.api(f"STREAM.INFO.{stream}", {}))["state"]["bytes"])

    async def subjects(self, stream: str, subject: str) -> dict[str, int]:
        """Return how many messages each subject under `subject` holds."""
        found: dict[str, int] = {}
        while True:
            request = {"subjects_filter": subject, "offset": len(found)}
            answer = await self._link.api(f"STREAM.INFO.{stream}", request)
            page = answer["state"].get("subjects") or {}
            found.update(page)
            if not page or len(found) >= answer.get("total", 0):
                return found

    async def close(self) -> None:
        """Stop the consumers; idempotent. The link is closed by its owner."""
        for consumer in list(self._consumers):
            await consumer.close()
        if self._repair is not None:
            self._repair.cancel()

    # ------------------------------------------------------------------------------------------------- streams

    async def _ensure_one(self, spec: StreamSpec, max_bytes: int) -> None:
        wanted = _config(spec, max_bytes)
        try:
            await self._link.api(f"STREAM.CREATE.{spec.name}", wanted)
        except ApiError as error:
            if error.number in _FULL:
                raise StoreFullError(
                    f"The broker's store has no room for the {max_bytes} bytes that stream {spec.name} may take; "
                    "give the broker more (max_file_store) or the streams less."
                ) from error
            if error.number != _NAME_IN_USE:
                raise
            await self._link.api(f"STREAM.UPDATE.{spec.name}", wanted)

    def _on_link(self, connected: bool) -> None:
        if connected and self._ensured is not None:
            if self._repair is not None:
                self._repair.cancel()
            self._repair = asyncio.create_task(self._ensure_again(), name="ensure-streams")

    async def _ensure_again(self) -> None:
        assert self._ensured is not None
        specs, max_bytes = self._ensured
        while True:
            try:
                await self.ensure(specs, max_bytes=max_bytes)
                return
            except TransportError as error:
                log.warning("streams not ensured yet", extra={"reason": str(error)})
                await asyncio.sleep(0.25)

    # --------------------------------------------------------------------------------------------------- append

    async def _stored(self, subject: str, answer: dict[str, Any]) -> int:
        """Return the sequence in an acknowledgement, or raise what its error means."""
        error = answer.get("error")
        if error is None:
            return int(answer["seq"])
        if is_already_there(error):
            found = await self._first(subject)
            if found is not None:
                return found
        raise append_error(subject, error)

    async def _first(self, subject: str) -> int | None:
        with suppress(ApiError):
            names = await self._link.api("STREAM.NAMES", {"subject": subject})
            for stream in names.get("streams") or ():
                stored = await self.get(stream, subject)
                if stored is not None:
                    return stored.sequence
        return None


def is_already_there(error: dict[str, Any]) -> bool:
    """Return whether a write-once subject refused because it holds a message."""
    return "per subject" in str(error.get("description", ""))


def append_error(subject: str, error: dict[str, Any]) -> TransportError:
    """Return the error of ours for a JetStream publish error."""
    number, text = int(error.get("err_code", 0)), str(error.get("description", "no reason"))
    if number in _FULL or (number == _WRITE_FAILED and "maximum" in text) or "no space" in text:
        return StoreFullError(f"The broker's store is full ({text}); nothing of {subject} was accepted.")
    if int(error.get("code", 0)) >= 500:
        return NoReplyError(f"The broker could not store {subject} now: {text} ({number}).")
    return ApiError(number, text)


def _config(spec: StreamSpec, max_bytes: int) -> dict[str, Any]:
    return {
        "name": spec.name,
        "subjects": [spec.subject],
        "retention": "workqueue" if spec.work_queue else "limits",
        "storage": "file",
        "discard": "new",
        "max_bytes": max_bytes,
        "max_age": spec.max_age_ms * 1_000_000,
        "max_msgs_per_subject": 1 if spec.one_message_a_subject else -1,
        "discard_new_per_subject": spec.one_message_a_subject,
        "duplicate_window": DUPLICATE_WINDOW_MS * 1_000_000,
        "allow_direct": True,
        "num_replicas": 1,
        "max_consumers": -1,
        "max_msgs": -1,
        "max_msg_size": -1,
    }
