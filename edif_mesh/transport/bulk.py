"""Bulk bytes to and from the broker, over a lane of their own so that control messages never wait behind them.

A `NatsBulk` keeps one lane open and opens another when it is lost. Storing repeats until it is acknowledged; receiving is
an ordered push consumer with flow control, made anew at the right place after every loss.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from edif_mesh.errors import NoReplyError, NotConnectedError, StoreFullError, TransportError
from edif_mesh.transport.lane import Lane, LaneMessage, open_lane
from edif_mesh.transport.nats_bus import Connection
from edif_mesh.transport.nats_link import Access, ack_numbers
from edif_mesh.transport.nats_streams import STREAM_NOT_FOUND, append_error, is_already_there
from edif_mesh.transport.ports import Arrived

log = logging.getLogger(__name__)

_TRY_S = 10.0
"""So long a lane may bring nothing while an answer is awaited; on a slow link the answer waits behind others."""
_LONGEST_S = 300.0
_RETRY_S = 0.1
_HEARTBEAT_NS = 500_000_000
_SILENCE_S = 1.5
_AHEAD_BYTES = 16 << 20
"""So much may have come and wait for its reader before the broker is made to wait."""


class NatsBulk:
    """One bulk connection for any number of transfers."""

    def __init__(self, url: str, *, name: str, access: Access | None = None) -> None:
        self._url, self._name, self._access = url, name, access or Access()
        self._lane: Lane | None = None
        self._opening = asyncio.Lock()
        self._answers = f"{self._access.inbox_prefix}.{secrets.token_hex(11)}"
        self._open: dict[str, asyncio.Future[LaneMessage]] = {}
        self._asked = 0
        self._closed = False

    @classmethod
    def beside(cls, connection: Connection) -> NatsBulk:
        """Return the bulk connection that belongs to an ordinary one; it opens itself when first used."""
        return cls(connection.url, name="bulk", access=connection.access)

    async def lane(self, *, timeout_ms: int = 5_000) -> Lane:
        """Return the open lane, a new one if need be; raises NotConnectedError."""
        if self._lane is not None and not self._lane.ended.done():
            return self._lane
        async with self._opening:
            if self._closed:
                raise NotConnectedError("The bulk connection was closed.")
            if self._lane is None or self._lane.ended.done():
                lane = await open_lane(self._url, self._access, self._name, timeout_ms=timeout_ms)
                lane.subscribe(f"{self._answers}.*", self._answered)
                lane.ended.add_done_callback(self._lost)
                self._lane = lane
            return self._lane

    async def close(self) -> None:
        """Close; idempotent."""
        self._closed = True
        if self._lane is not None:
            self._lane.close()

    # ------------------------------------------------------------------------------------------------------ storing

    async def store(
        self, subject: str, pieces: Sequence[bytes | memoryview], *, message_id: str, timeout_ms: int = 60_000
    ) -> bool:
        """Store one message durably; repeats through lost links and restarted brokers until `timeout_ms` have passed.

        Returns False when the write-once subject already holds a message that did not come with this id: the caller
        must look whether it is the same one.

        Raises:
            StoreFullError: the stream is at its limit.
            NoReplyError, NotConnectedError: not known to be stored in time.
        """
        size = sum(len(piece) for piece in pieces)
        header = b"NATS/1.0\r\nNats-Msg-Id: %s\r\n\r\n" % message_id.encode()
        last: TransportError = NoReplyError(f"Storing on {subject} got no time at all.")
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                while True:
                    try:
                        answer = await self._exchange(subject, header, pieces, size)
                        return _accepted(subject, answer)
                    except (NoReplyError, NotConnectedError) as error:
                        last = error
                        log.debug("bulk store repeats", extra={"subject": subject, "reason": str(error)})
                    if self._closed:
                        raise last
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            raise last from None

    async def api(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        """Ask JetStream's API; raises NoReplyError while the stream is missing, TransportError for another error."""
        data = json.dumps(request).encode()
        answer = await self._exchange(f"$JS.API.{name}", b"", (data,), len(data))
        value: dict[str, Any] = json.loads(bytes(answer.data))
        if "error" in value:
            text = f"The broker refused {name}: {value['error'].get('description')}."
            # A wiped broker has no streams until the coordinator has made them again.
            raise NoReplyError(text) if value["error"].get("err_code") == STREAM_NOT_FOUND else TransportError(text)
        return value

    async def _exchange(
        self, subject: str, header: bytes, pieces: Sequence[bytes | memoryview], size: int
    ) -> LaneMessage:
        """Publish and wait for the answer; raises NoReplyError, NotConnectedError."""
        lane = await self.lane()
        self._asked += 1
        token = f"{self._asked:x}"
        future: asyncio.Future[LaneMessage] = asyncio.get_running_loop().create_future()
        self._open[token] = future
        reply = f"{self._answers}.{token}"
        try:
            if header:
                line = f"HPUB {subject} {reply} {len(header)} {len(header) + size}\r\n".encode()
            else:
                line = f"PUB {subject} {reply} {size}\r\n".encode()
            await lane.drain()
            lane.send(line, header, *pieces, b"\r\n")
            sent_at = now = time.monotonic()
            while not future.done():
                silent_until = min(max(sent_at, lane.heard_at) + _TRY_S, sent_at + _LONGEST_S)
                if now >= silent_until:
                    raise NoReplyError(f"No answer on {subject} within {now - sent_at:.0f} s.")
                await asyncio.wait({future}, timeout=silent_until - now)
                now = time.monotonic()
            answer = future.result()
        finally:
            self._open.pop(token, None)
            if not future.cancel() and not future.cancelled():
                future.exception()  # it counts as seen
        if answer.status == "503":
            raise NoReplyError(f"No stream takes {subject} now.")
        return answer

    def _answered(self, message: LaneMessage) -> None:
        future = self._open.get(message.subject.rpartition(".")[2])
        if future is not None and not future.done():
            future.set_result(message)

    def _lost(self, ended: asyncio.Future[str]) -> None:
        for future in self._open.values():
            if not future.done():
                future.set_exception(NotConnectedError(f"The bulk connection was lost: {ended.result()}."))

    # ---------------------------------------------------------------------------------------------------- receiving

    async def get(self, stream: str, subject: str) -> Arrived | None:
        """Return the last message of `subject`, or None; raises NoReplyError, NotConnectedError."""
        answer = await self._exchange(f"$JS.API.DIRECT.GET.{stream}.{subject}", b"", (), 0)
        if answer.status == "404":
            return None
        if not answer.header("Nats-Sequence"):
            raise TransportError(f"The broker did not give {subject}: {answer.header('Description') or 'no reason'}.")
        return Arrived(answer.header("Nats-Subject"), answer.data, int(answer.header("Nats-Sequence")))

    async def listen(
        self, subject: str, receiver: Callable[[str, memoryview], None], *, at_most: int
    ) -> Callable[[], None]:
        """Call `receiver(subject, data)` for the next `at_most` messages published there; best effort, lost on a cut.

        Returns how to stop sooner.
        """
        lane = await self.lane()
        sid = lane.subscribe(subject, lambda message: receiver(message.subject, message.data), at_most=at_most)
        return lambda: lane.unsubscribe(sid)

    async def push(self, stream: str, subject: str) -> AsyncGenerator[list[Arrived], None]:
        """Yield what the stream holds on `subject`, in order and without gaps, for ever.

        See `ports.Bulk.push`: batches are what has arrived meanwhile; taking the next one answers flow control.
        """
        follow = 1
        while not self._closed:
            push = _Push(self, stream, subject, follow)
            try:
                await push.start()
                async for batch in push.batches():
                    if batch:
                        follow = batch[-1].sequence + 1
                    yield batch
            except TransportError as error:
                log.debug("push begins again", extra={"subject": subject, "reason": str(error)})
                await asyncio.sleep(_RETRY_S)
                yield []
            finally:
                push.stop()
        raise NotConnectedError("The bulk connection was closed.")


class _Push:
    """One ephemeral push consumer on one lane; ends at the first gap, silence or loss."""

    def __init__(self, bulk: NatsBulk, stream: str, subject: str, start: int) -> None:
        self._bulk, self._stream, self._subject, self._start = bulk, stream, subject, start
        self._items: list[LaneMessage] = []
        self._waiting_bytes = 0
        self._ready = asyncio.Event()
        self._delivered = 0
        self._pending = 1
        self._lane: Lane | None = None
        self._sid = 0

    async def start(self) -> None:
        """Create the consumer; raises TransportError."""
        self._lane = lane = await self._bulk.lane()
        inbox = f"{self._bulk._access.inbox_prefix}.{secrets.token_hex(11)}"
        self._sid = lane.subscribe(inbox, self._received)
        config = {
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self._start,
            "filter_subject": self._subject,
            "deliver_subject": inbox,
            "ack_policy": "none",
            "max_deliver": 1,
            "flow_control": True,
            "idle_heartbeat": _HEARTBEAT_NS,
            "inactive_threshold": 10_000_000_000,
            "mem_storage": True,
            "num_replicas": 1,
            "replay_policy": "instant",
        }
        await self._bulk.api(f"CONSUMER.CREATE.{self._stream}", {"stream_name": self._stream, "config": config})

    def stop(self) -> None:
        """Give the subject up; the broker forgets the consumer by itself."""
        if self._lane is not None:
            self._lane.unsubscribe(self._sid)

    async def batches(self) -> AsyncIterator[list[Arrived]]:
        """Yield batches until the consumer cannot be trusted any more."""
        assert self._lane is not None
        self._lane.ended.add_done_callback(lambda _: self._ready.set())
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SILENCE_S):
                    await self._ready.wait()
            self._ready.clear()
            items, self._items, self._waiting_bytes = self._items, [], 0
            if not items:
                return  # silence, or the lane is gone
            good, gap = self._sort(items)
            if good:
                yield good
            self._answer(items)
            if gap:
                return
            # A request of flow control says nothing of what is still to come; a heartbeat comes when nothing else did.
            if self._pending == 0 or (not good and any(item.status and not item.reply for item in items)):
                yield []

    def _sort(self, items: list[LaneMessage]) -> tuple[list[Arrived], bool]:
        good: list[Arrived] = []
        for message in items:
            if message.status:
                last = message.header("Nats-Last-Consumer")
                if message.status != "100" or (last and int(last) > self._delivered):
                    return good, True
                continue
            sequence, delivered = ack_numbers(message.reply)
            if delivered != self._delivered + 1:
                return good, True
            self._delivered = delivered
            self._pending = int(message.reply.split(".")[8 if message.reply.count(".") == 8 else 10])
            good.append(Arrived(message.subject, message.data, sequence))
        return good, False

    def _answer(self, items: list[LaneMessage]) -> None:
        """Let the broker send more, now that these have been taken."""
        assert self._lane is not None
        for message in items:
            if message.status == "100":
                reply = message.reply or message.header("Nats-Consumer-Stalled")
                if reply:
                    with suppress(NotConnectedError):  # what has come meanwhile is still good
                        self._lane.publish(reply, b"")

    def _received(self, message: LaneMessage) -> None:
        if message.status == "100" and message.reply and self._waiting_bytes < _AHEAD_BYTES:
            assert self._lane is not None
            with suppress(NotConnectedError):
                self._lane.publish(
                    message.reply, b""
                )  # what is on its way comes while the reader works on what has come
            return
        self._waiting_bytes += len(message.data)
        self._items.append(message)
        self._ready.set()


def _accepted(subject: str, answer: LaneMessage) -> bool:
    value = json.loads(bytes(answer.data))
    error = value.get("error")
    if error is None:
        return True
    if is_already_there(error):
        return False
    raised = append_error(subject, error)
    if isinstance(raised, StoreFullError):
        log.warning("store full", extra={"subject": subject})
    raise raised
