"""Server-sent events for the page: one frame for all readers, made at most a few times a second, only while read.

A reader that is slow gets the newest frame when it is ready for it, and the ones between never; one that takes
nothing for `STALL_S` is cut off. So no reader can slow the loop or fill the memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable

from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

MAX_READERS = 32
STALL_S = 20.0
LOOK_S = 0.3
"""How often changes are looked for; a frame is also sent every `REFRESH_S` without any."""
REFRESH_S = 2.0


class Hub:
    """Makes frames while there are readers."""

    def __init__(self, changes: Callable[[], int], frame: Callable[[], Awaitable[dict[str, object]]]) -> None:
        """`changes` rises when a new frame is due; `frame` makes its content."""
        self._changes, self._make = changes, frame
        self._readers = 0
        self._frame = b""
        self._fresh = asyncio.Event()
        self._maker: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether no further reader is served."""
        return self._closed or self._readers >= MAX_READERS

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        self._fresh.set()
        if self._maker is not None:
            self._maker.cancel()

    async def serve(self, send: Send) -> None:
        """Send frames until the reader stalls or goes (by cancellation or an error of `send`)."""
        self._readers += 1
        if self._maker is None or self._maker.done():
            self._frame = b""
            self._maker = asyncio.create_task(self._run(), name="monitoring frames")
        last = b""
        try:
            while not self._closed:
                if self._frame and self._frame is not last:
                    last = self._frame
                    async with asyncio.timeout(STALL_S):
                        await send({"type": "http.response.body", "body": last, "more_body": True})
                else:
                    await self._fresh.wait()
        finally:
            self._readers -= 1

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        seen, sent_at = -1, 0.0
        while self._readers and not self._closed:
            if self._changes() != seen or loop.time() - sent_at >= REFRESH_S:
                seen, sent_at = self._changes(), loop.time()
                try:
                    content = await self._make()
                except Exception:
                    log.exception("no frame for the page")
                else:
                    self._publish(b"event: view\ndata: " + json.dumps(content).encode() + b"\n\n")
            await asyncio.sleep(LOOK_S)

    def _publish(self, frame: bytes) -> None:
        self._frame = frame
        self._fresh.set()
        self._fresh = asyncio.Event()


class StreamResponse:
    """The ASGI response of one reader of the hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        sender = asyncio.create_task(self._hub.serve(send), name="monitoring reader")
        watcher = asyncio.create_task(_gone(receive), name="monitoring reader's end")
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done() and sender.exception() is None:  # the hub was closed; a stalled reader is just cut off
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for task in (sender, watcher):
                task.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
