"""WebSocket sessions of blocking clients."""

from __future__ import annotations

import asyncio
import contextlib
import secrets

from fastapi import WebSocket, WebSocketDisconnect

from edif_mesh.gateway.frames import text_frame


class Sessions:
    """Open sessions by id; frames for a session whose client has gone are dropped, the job goes on."""

    def __init__(self) -> None:
        self._queues: dict[str, asyncio.Queue[str | bytes]] = {}

    async def serve(self, socket: WebSocket) -> None:
        """Serve one client until it leaves."""
        await socket.accept()
        session = secrets.token_urlsafe(16)
        queue = self._queues[session] = asyncio.Queue()
        await socket.send_text(text_frame({"session_id": session}))
        sending = asyncio.create_task(_pump(queue, socket))
        try:
            while True:
                if (await socket.receive())["type"] == "websocket.disconnect":
                    return
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            del self._queues[session]
            sending.cancel()

    def __contains__(self, session: str) -> bool:
        return session in self._queues

    def send(self, session: str, data: str | bytes) -> None:
        """Queue one frame for a session."""
        queue = self._queues.get(session)
        if queue is not None:
            queue.put_nowait(data)


async def _pump(queue: asyncio.Queue[str | bytes], socket: WebSocket) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            data = await queue.get()
            if isinstance(data, bytes):
                await socket.send_bytes(data)
            else:
                await socket.send_text(data)
