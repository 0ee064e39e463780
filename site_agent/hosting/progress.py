"""How far a host has come with its weights, seen from outside: by the memory that its process holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from site_agent.hosting.footprint import resident_bytes
from site_agent.hosting.spec import LOADING_WEIGHTS

_LOOK_EVERY_S = 1.0
_LIBRARIES_BYTES = 100 << 20
"""What transformers still imports once it has begun to load: not weights."""


class LoadingProgress:
    """Says each stage that the host names, and while weights come into memory, how much of them is there.

    A weight that is mapped from its file comes when it is first touched, perhaps only during the warm-up; so the share is
    told until the host is ready.
    """

    def __init__(self, weights_bytes: int, say: Callable[[str], None]) -> None:
        """`weights_bytes` as estimated; 0 when unknown, and no share is told then."""
        self._weights_bytes, self._say = weights_bytes, say
        self._pid, self._stage, self._base = 0, "", -1
        self._said = ""
        self._task: asyncio.Task[None] | None = None

    def started(self, pid: int) -> None:
        """The host's process is `pid`, as this process counts."""
        self._pid = pid
        self._task = asyncio.create_task(self._look(), name="loading progress")

    def stage(self, text: str) -> None:
        """The host has begun with `text`."""
        self._stage = text
        if self._base < 0 and text == LOADING_WEIGHTS and self._pid:
            self._base = resident_bytes(self._pid) + _LIBRARIES_BYTES
        self._tell()

    def close(self) -> None:
        """It is loaded, or never will be."""
        if self._task is not None:
            self._task.cancel()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if self._base >= 0:
                self._tell()

    def _tell(self) -> None:
        text = self._stage
        if self._base >= 0 and self._weights_bytes:
            share = (resident_bytes(self._pid) - self._base) / self._weights_bytes
            percent = max(0, min(99, int(100 * share)))
            text = f"{text}, {percent} % of {_size(self._weights_bytes)} in memory"
        if text != self._said:
            self._said = text
            self._say(text)


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 50_000_000 else f"{count / 1e6:,.1f} MB"
