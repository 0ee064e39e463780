"""Where chunks come from: the broker always; other ways keep the same promises."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Protocol

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.errors import ChunkError, NoReplyError, NotConnectedError
from edif_mesh.transport.ports import Bulk
from edif_mesh.wire import subjects

_LEAST_WINDOW, _FIRST_WINDOW, _LAST_WINDOW = 2, 8, 32
"""How many chunks are asked for at once: on a slow link, at first, and on a fast and long one."""
_QUEUED_S, _SLOW_S = 0.1, 2.0
"""An answer that takes less than the one has not waited for others; one that takes more than the other has, for too long."""
_AGAIN_S = 0.2

Batch = list[tuple[int, memoryview]]


@dataclass(frozen=True, slots=True)
class Address:
    """Whose chunks."""

    job: JobId
    attempt: AttemptNumber


class Source(Protocol):
    """One way to the chunks of an attempt. What it gives is not believed but checked by the reader."""

    def chunks(self, address: Address, wanted: Mapping[int, int]) -> AsyncGenerator[Batch, None]:
        """Yield the wanted chunks (number, stored bytes) in any order, some at a time, until all were given.

        The bytes are the reader's until it asks for the next batch: their memory may then be used again.
        Raises ChunkError that names what is missing, and OSError or TransportError when this way is closed.
        """


class Way(Source, Protocol):
    """A further way, which may fail without harm: the broker has everything."""

    def refused(self, reason: str) -> None:
        """Something that it gave was not what the site has signed."""


class BrokerSource:
    """The chunks as the broker keeps them; goes on through lost links and restarted brokers while anything comes.

    Each chunk is asked for by name, a window of them at a time. The window opens as TCP's does, until answers begin to queue
    on the link: a link across Europe stays full, a slow one has no more waiting than it must. (A push consumer with
    flow control begins with 2 MiB and took half again as long at 60 ms; on loopback there was no difference.)
    """

    def __init__(self, bulk: Bulk, patience_ms: int) -> None:
        self._bulk, self._patience_s = bulk, patience_ms / 1000

    async def ask(self, address: Address, name: int | str) -> memoryview | None:
        """Return one chunk by name, None when it is not there; repeats while the broker is away, within our patience."""
        deadline = time.monotonic() + max(self._patience_s, 10)
        subject = subjects.result_chunk(address.job, address.attempt, name)
        while True:
            try:
                arrived = await self._bulk.get(subjects.RESULTS_STREAM, subject)
            except (NotConnectedError, NoReplyError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_AGAIN_S)
            else:
                return arrived.data if arrived is not None else None

    async def chunks(self, address: Address, wanted: Mapping[int, int]) -> AsyncGenerator[Batch, None]:
        """See `Source`. Raises NotConnectedError, NoReplyError when the broker stays away."""
        left, window = set(wanted), _Window()
        deadline = time.monotonic() + self._patience_s
        while left:
            rest, asking = deque(sorted(left)), set[asyncio.Task[tuple[int, memoryview | None]]]()
            try:
                while rest or asking:
                    while rest and len(asking) < window.size:
                        asking.add(asyncio.create_task(self._one(address, rest.popleft(), window)))
                    done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                    found = [(n, data) for n, data in (task.result() for task in done) if data is not None]
                    asking -= done
                    if found:
                        deadline = time.monotonic() + self._patience_s
                        left.difference_update(number for number, _ in found)
                        yield found
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
            if left and time.monotonic() > deadline:
                raise ChunkError(f"Of the result's chunks {named(sorted(left))} missing at the broker.")
            if left:
                await asyncio.sleep(_AGAIN_S)

    async def _one(self, address: Address, number: int, window: _Window) -> tuple[int, memoryview | None]:
        began = time.monotonic()
        data = await self.ask(address, number)
        window.answered(time.monotonic() - began)
        return number, data


class _Window:
    """How many chunks are under way: one more with every answer while answers do not queue up, one less while they queue long."""

    def __init__(self) -> None:
        self.size = _FIRST_WINDOW
        self._least_s = math.inf

    def answered(self, took_s: float) -> None:
        """An answer came after so long."""
        self._least_s = min(self._least_s, took_s)
        if self.size < _LAST_WINDOW and took_s < max(2 * self._least_s, _QUEUED_S):
            self.size += 1
        elif self.size > _LEAST_WINDOW and took_s > _SLOW_S:
            self.size -= 1


def named(numbers: list[int]) -> str:
    """Return chunk numbers as a sentence names them, with its verb."""
    shown = ", ".join(str(number) for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    return f"{shown} {'is' if len(numbers) == 1 else 'are'}"
