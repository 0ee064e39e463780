"""Where chunks come from: the broker always; other ways keep the same promises."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.errors import ChunkError, NoReplyError, NotConnectedError
from edif_mesh.transport.ports import Arrived, Bulk
from edif_mesh.wire import subjects

_FEW = 8
"""So few are asked for by name."""
_DENSE = 0.7
"""A push brings everything from the first to the last; it is used when at least this part of it is wanted."""
_AT_ONCE = 24
_AGAIN_S = 0.2

Batch = list[tuple[int, memoryview]]


@dataclass(frozen=True, slots=True)
class Address:
    """Whose chunks."""

    job: JobId
    attempt: AttemptNumber
    last: int = -1
    """The number of its last chunk, where that is known."""


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
    """The chunks as the broker keeps them; goes on through lost links and restarted brokers while anything comes."""

    def __init__(self, bulk: Bulk, patience_ms: int) -> None:
        self._bulk, self._patience_s = bulk, patience_ms / 1000

    async def chunks(self, address: Address, wanted: Mapping[int, int]) -> AsyncGenerator[Batch, None]:
        """See `Source`. Raises NotConnectedError, NoReplyError when the broker stays away."""
        left = set(wanted)
        # A push does not know where to stop: what is on its way behind the last wanted chunk would come for nothing.
        if len(left) > _FEW and max(left) == address.last and len(left) >= _DENSE * (max(left) - min(left) + 1):
            first = await self._arrived(address, min(left))
            start = first.sequence if first is not None else 1
            async with aclosing(self._pushed(address, left, start)) as pushing:
                async for batch in pushing:
                    yield batch
        async with aclosing(self._by_name(address, left)) as asking:
            async for batch in asking:
                yield batch

    async def ask(self, address: Address, name: int | str) -> memoryview | None:
        """Return one chunk by name, None when it is not there; repeats while the broker is away, within our patience."""
        arrived = await self._arrived(address, name)
        return arrived.data if arrived is not None else None

    async def _arrived(self, address: Address, name: int | str) -> Arrived | None:
        deadline = time.monotonic() + max(self._patience_s, 10)
        subject = subjects.result_chunk(address.job, address.attempt, name)
        while True:
            try:
                return await self._bulk.get(subjects.RESULTS_STREAM, subject)
            except (NotConnectedError, NoReplyError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_AGAIN_S)

    async def _pushed(self, address: Address, left: set[int], start: int) -> AsyncGenerator[Batch, None]:
        """Take chunks as the broker pushes them, until the rest lies behind us or none comes any more."""
        filter_subject = subjects.result_chunks(address.job, address.attempt)
        heard_at = time.monotonic()
        async with aclosing(self._bulk.push(subjects.RESULTS_STREAM, filter_subject, start=start)) as pushing:
            async for batch in pushing:
                if batch:
                    heard_at = time.monotonic()
                    numbered = _numbered(batch)
                    left.difference_update(number for number, _ in numbered)
                    yield numbered
                if not left or (not batch and await self._all_are_there(address, left)):
                    return
                if time.monotonic() - heard_at > self._patience_s:
                    return

    async def _all_are_there(self, address: Address, left: set[int]) -> bool:
        """Whether the broker holds everything that is missing here, so that it must have been pushed past us."""
        try:
            names = await self._bulk.names(
                subjects.RESULTS_STREAM, subjects.result_chunks(address.job, address.attempt)
            )
        except (NotConnectedError, NoReplyError):
            return False
        return all(subjects.result_chunk(address.job, address.attempt, number) in names for number in left)

    async def _by_name(self, address: Address, left: set[int]) -> AsyncGenerator[Batch, None]:
        """Ask for each missing chunk, some at once, until all are there or our patience ends."""
        deadline = time.monotonic() + self._patience_s
        while left:
            asking = [asyncio.ensure_future(self._one(address, number)) for number in sorted(left)[:_AT_ONCE]]
            try:
                rest = sorted(left)[_AT_ONCE:]
                while asking:
                    done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                    asking = [task for task in asking if task not in done]
                    asking += [asyncio.ensure_future(self._one(address, n)) for n in rest[: len(done)]]
                    rest = rest[len(done) :]
                    found = [(n, data) for n, data in (task.result() for task in done) if data is not None]
                    if found:
                        deadline = time.monotonic() + self._patience_s
                        left.difference_update(number for number, _ in found)
                        yield found
            finally:
                for task in asking:
                    task.cancel()
            if left and time.monotonic() > deadline:
                raise ChunkError(f"Of the result's chunks {named(sorted(left))} missing at the broker.")
            if left:
                await asyncio.sleep(_AGAIN_S)

    async def _one(self, address: Address, number: int) -> tuple[int, memoryview | None]:
        return number, await self.ask(address, number)


def _numbered(batch: list[Arrived]) -> Batch:
    found = []
    for arrived in batch:
        address = subjects.parse_result(arrived.subject)
        if address is not None and address.name.isdigit():
            found.append((int(address.name), arrived.data))
        elif address is None or not address.name.startswith(("index", "part-")):
            raise ChunkError(f"A foreign chunk lies among the result's: {arrived.subject}.")
    return found


def named(numbers: list[int]) -> str:
    """Return chunk numbers as a sentence names them, with its verb."""
    shown = ", ".join(str(number) for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    return f"{shown} {'is' if len(numbers) == 1 else 'are'}"
