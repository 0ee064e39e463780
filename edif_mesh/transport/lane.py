"""A lane: one plain connection that speaks the NATS client protocol for bulk bytes, and nothing else.

nats-py copies every payload several times and reads 32 KiB at a time; a lane receives each payload straight into its own
buffer. It knows no reconnecting: when it ends, its owner (`bulk.py`) opens another. User and password, token and TLS
are supported; WebSocket and NATS credential files are not.

Protocol: https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from edif_mesh.errors import NotConnectedError, TransportError
from edif_mesh.transport.nats_link import Access

_HEAD_BYTES = 16 << 10
"""The buffer for protocol lines; also the most of a payload that is copied once more."""
_MAX_MESSAGE_BYTES = 8 << 20
"""The broker's `max_payload` is 1 MiB; a peer that announces more is no broker of ours."""
_WRITE_HIGH_BYTES = 4 << 20
_PING_S = 1.5
"""Less than a hub's own `ping_interval` of 2 s: its question would wait behind what a slow link has still to bring, and it
would take us for dead; it does not ask whom it has heard."""
_SILENT_PINGS = 10


@dataclass(frozen=True, slots=True)
class LaneMessage:
    """One message; `data` belongs to the receiver."""

    subject: str
    reply: str
    headers: bytes
    """The raw header block, or empty."""
    data: memoryview

    @property
    def status(self) -> str:
        """The NATS status (`100`, `404`, `503`, ...) of a message without data, else ''."""
        code = self.headers[9:12] if self.headers[:9] == b"NATS/1.0 " and not self.data else b""
        return code.decode() if code.isdigit() else ""

    def header(self, name: str) -> str:
        """Return the value of a header, or ''."""
        for line in self.headers.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name.lower().encode():
                return value.strip().decode("utf-8", "replace")
        return ""


Receiver = Callable[[LaneMessage], None]


async def open_lane(url: str, access: Access, name: str, *, timeout_ms: int = 5_000) -> Lane:
    """Connect and log in; raises NotConnectedError that says why, TransportError for a scheme that lanes cannot speak."""
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    if parts.scheme not in {"nats", "tls"} or access.credentials_file is not None:
        raise TransportError(f"Bulk transfer cannot use {parts.scheme}:// with these credentials.")
    lane = Lane()
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            await loop.create_connection(lambda: lane, parts.hostname or "127.0.0.1", parts.port or 4222)
            info = await lane.info
            if info.get("tls_required") or parts.scheme == "tls":
                context = access.tls("tls://") or ssl.create_default_context()
                await lane.secure(context, parts.hostname or "")
            user = access.user or (parts.username if parts.password else None)
            token = access.token or (parts.username if not parts.password else None)
            await lane.log_in(name, user, access.password or parts.password, token)
    except (OSError, TimeoutError, NotConnectedError) as error:
        lane.close()
        raise NotConnectedError(f"The broker at {url} gives no bulk connection: {error or 'no answer'}.") from error
    return lane


class Lane(asyncio.BufferedProtocol):
    """One connection; callbacks run on its event loop and must not block."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.info: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.ended: asyncio.Future[str] = loop.create_future()
        """Done, with the reason, once the connection is gone."""
        self._pong: asyncio.Future[None] = loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._receivers: dict[int, Receiver] = {}
        self._sid = 0
        self._head = bytearray(_HEAD_BYTES)
        self._filled = 0
        self._body: bytearray | None = None
        self._body_filled = 0
        self._body_line: tuple[int, str, str, int] = (0, "", "", 0)
        self.heard_at = 0.0
        """When (monotonic seconds) a part of a message came last."""
        self._pings = 0
        self._timer: asyncio.TimerHandle | None = None
        self._error = ""

    # ---------------------------------------------------------------------------------------------------- sending

    def send(self, *pieces: bytes | bytearray | memoryview) -> None:
        """Write one whole protocol frame; raises NotConnectedError. Bytes must not change afterwards."""
        if self._transport is None or self.ended.done():
            raise NotConnectedError("The bulk connection is gone.")
        self._transport.writelines(pieces)

    def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Publish a small message without headers."""
        self.send(f"PUB {subject} {reply} {len(data)}\r\n".encode(), data, b"\r\n")

    async def drain(self) -> None:
        """Wait until the socket has taken most of what was sent; raises NotConnectedError when it is gone."""
        await self._writable.wait()
        if self.ended.done():
            raise NotConnectedError("The bulk connection is gone.")

    def subscribe(self, subject: str, receiver: Receiver, *, at_most: int = 0) -> int:
        """Call `receiver` for every message (the first `at_most` when given); returns the number to unsubscribe."""
        self._sid += 1
        self._receivers[self._sid] = receiver
        more = f"UNSUB {self._sid} {at_most}\r\n" if at_most else ""
        self.send(f"SUB {subject} {self._sid}\r\n{more}".encode())
        return self._sid

    def unsubscribe(self, sid: int) -> None:
        """Stop receiving; silent when the connection is gone."""
        if self._receivers.pop(sid, None) is not None:
            with suppress(NotConnectedError):
                self.send(f"UNSUB {sid}\r\n".encode())

    def close(self) -> None:
        """Close after what was sent; idempotent."""
        if self._transport is not None:
            self._transport.close()
        self._finish("it was closed")

    # --------------------------------------------------------------------------------------------------- logging in

    async def secure(self, context: ssl.SSLContext, hostname: str) -> None:
        """Upgrade to TLS."""
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        secured = await loop.start_tls(self._transport, self, context, server_hostname=hostname)
        if secured is None:
            raise NotConnectedError("the TLS handshake failed")
        self._transport = secured

    async def log_in(self, name: str, user: str | None, password: str | None, token: str | None) -> None:
        """Send CONNECT and wait for the answer."""
        options = {
            "verbose": False,
            "pedantic": False,
            "lang": "edif-lane",
            "version": "1",
            "protocol": 1,
            "headers": True,
            "no_responders": True,
            "name": name,
        }
        options |= {"user": user, "pass": password} if user else {}
        options |= {"auth_token": token} if token else {}
        self.send(b"CONNECT " + json.dumps(options).encode() + b"\r\nPING\r\n")
        waiting: set[asyncio.Future[Any]] = {self._pong, self.ended}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self.ended.done():
            raise NotConnectedError(self.ended.result())
        self._timer = asyncio.get_running_loop().call_later(_PING_S, self._ping)

    def _ping(self) -> None:
        self._pings += 1
        if self._pings > _SILENT_PINGS:
            self._error = "the broker fell silent"
            if self._transport is not None:
                self._transport.abort()
            return
        with suppress(NotConnectedError):
            self.send(b"PING\r\n")
            self._timer = asyncio.get_running_loop().call_later(_PING_S, self._ping)

    # ---------------------------------------------------------------------------------------------------- receiving

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        self._finish(self._error or str(exc or "the broker closed it"))

    def pause_writing(self) -> None:
        """Of asyncio."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Of asyncio."""
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Of asyncio: where the next bytes go, a payload straight into its own buffer."""
        if self._body is not None:
            return memoryview(self._body)[self._body_filled :]
        return memoryview(self._head)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Of asyncio."""
        self._pings = 0
        if self._body is not None:
            self.heard_at = time.monotonic()
            self._body_filled += nbytes
            if self._body_filled == len(self._body):
                body, self._body = self._body, None
                self._dispatch(body)
            return
        self._filled += nbytes
        try:
            self._parse()
        except (ValueError, IndexError, RecursionError, NotConnectedError) as error:
            self._error = f"the broker sent what is no NATS protocol ({error})"
            if self._transport is not None:
                self._transport.abort()

    def eof_received(self) -> bool:
        """Of asyncio."""
        return False

    def _parse(self) -> None:
        """Take every whole line out of the head; of a payload that is not all there, begin its own buffer."""
        head, start = self._head, 0
        while (end := head.find(b"\r\n", start, self._filled)) >= 0:
            line = bytes(memoryview(head)[start:end])
            start = end + 2
            needed = self._line(line)
            if needed is None:
                continue
            body = bytearray(needed)
            got = min(needed, self._filled - start)
            body[:got] = memoryview(head)[start : start + got]
            start += got
            if got < needed:
                self._body, self._body_filled = body, got
                break
            self._dispatch(body)
        left = self._filled - start
        if left >= _HEAD_BYTES:
            raise ValueError("an endless line")
        head[:left] = head[start : self._filled]
        self._filled = left

    def _line(self, line: bytes) -> int | None:
        """Handle one protocol line; returns how many bytes of payload (with CRLF) follow, or None."""
        if line.startswith((b"MSG ", b"HMSG ")):
            words = line.decode().split()
            with_headers = words[0] == "HMSG"
            sizes = 2 if with_headers else 1
            reply = words[3] if len(words) == 4 + sizes else ""
            total, header = int(words[-1]), int(words[-2]) if with_headers else 0
            if not 0 <= header <= total <= _MAX_MESSAGE_BYTES:
                raise ValueError("a message of impossible size")
            self._body_line = (int(words[2]), words[1], reply, header)
            return total + 2
        if line == b"PING":
            self.send(b"PONG\r\n")
        elif line == b"PONG":
            if not self._pong.done():
                self._pong.set_result(None)
        elif line.startswith(b"INFO "):
            if not self.info.done():
                self.info.set_result(json.loads(line[5:]))
        elif line.startswith(b"-ERR"):
            self._error = line[5:].decode("utf-8", "replace").strip("' ")
        elif line not in (b"+OK", b""):
            raise ValueError(repr(line[:20]))
        return None

    def _dispatch(self, body: bytearray) -> None:
        self.heard_at = time.monotonic()
        sid, subject, reply, header = self._body_line
        receiver = self._receivers.get(sid)
        if receiver is not None:
            view = memoryview(body)
            receiver(LaneMessage(subject, reply, bytes(view[:header]), view[header:-2]))

    def _finish(self, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._writable.set()
        if not self.ended.done():
            self.ended.set_result(reason)
        if not self.info.done():
            self.info.set_exception(NotConnectedError(reason))
