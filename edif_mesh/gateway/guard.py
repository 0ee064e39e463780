"""Who may talk to a personal gateway: programs on this machine, but no web page that the researcher happens to visit.

A page on any site can make a browser send requests to 127.0.0.1. Such requests carry a foreign `Origin`, or a
`Sec-Fetch-Site` that says so, or (DNS rebinding) a `Host` that is not ours; all are refused before anything is read.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class LocalOnly:
    """ASGI middleware: the host must be ours and no foreign origin may stand in the request."""

    def __init__(self, app: App, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 403 (HTTP) or 1008 (WebSocket)."""
        if scope["type"] in ("http", "websocket") and not self._allowed(scope):
            await _refuse(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        hosts, origins, fetch_sites = (_values(scope, name) for name in (b"host", b"origin", b"sec-fetch-site"))
        if len(hosts) != 1 or _name(hosts[0]) not in self._hosts:
            return False
        own = {f"{scheme}://{hosts[0]}" for scheme in ("http", "https")}
        return all(origin in own for origin in origins) and all(s in ("same-origin", "none") for s in fetch_sites)


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _name(host: str) -> str:
    return host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps(
        {"detail": "This is a personal gateway: only programs on this machine may use it, addressed as 127.0.0.1."}
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
