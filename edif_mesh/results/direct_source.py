"""The chunks of an attempt straight from the site that has made them: threads receive while the reader checks and places."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping

from edif_mesh.errors import ChunkError
from edif_mesh.results.direct_link import DirectError, DirectLink
from edif_mesh.results.sources import Address, Batch, named
from edif_mesh.wire.messages import DirectEndpoint

LINKS = 2
BATCH_BYTES = 4 << 20
"""Received before it is handed over."""
_BUFFERS = 4
_REQUEST_BATCHES = 4
"""A request asks for at most so many batches; the next one is sent before the first is answered."""

Numbers = list[int]


class DirectSource:
    """One attempt's chunks from the endpoint that its manifest names."""

    def __init__(self, endpoint: DirectEndpoint, envelope: Callable[[], str], links: int = LINKS) -> None:
        """`envelope` returns a fresh signed `FetchResult` for the attempt."""
        self._endpoint, self._envelope, self._links = endpoint, envelope, links

    async def chunks(self, address: Address, wanted: Mapping[int, int]) -> AsyncGenerator[Batch, None]:
        """See `Source`. Raises OSError when the endpoint cannot be reached or breaks off, DirectError when it refuses."""
        run = _Run(self._endpoint, self._envelope, address, wanted, asyncio.get_running_loop())
        left = set(wanted)
        # Threads of its own: those of the event loop's pool must be free for checking what these wait to hand over.
        for _ in range(min(self._links, run.requests)):
            threading.Thread(target=run.receive, name="direct", daemon=True).start()
        try:
            while left:
                batch, buffer = await run.next()
                left.difference_update(number for number, _ in batch)
                yield batch
                run.give_back(buffer)
        finally:
            run.stop()
        if left:
            raise ChunkError(f"Of the result's chunks {named(sorted(left))} missing at the site.")


class _Run:
    """One read: requests to be made, buffers to be filled, batches to be handed over."""

    def __init__(
        self, endpoint: DirectEndpoint, envelope: Callable[[], str], address: Address, wanted: Mapping[int, int],
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self._endpoint, self._envelope, self._address, self._wanted = endpoint, envelope, address, wanted
        self._loop = loop
        batches = _batches(wanted)
        at_once = max(1, min(_REQUEST_BATCHES, len(batches) // LINKS))
        self._to_ask = deque(batches[start : start + at_once] for start in range(0, len(batches), at_once))
        self.requests = len(self._to_ask)
        self._largest = max(sum(wanted[number] for number in batch) for batch in batches)
        self._buffers = threading.Semaphore(_BUFFERS)
        self._free: deque[bytearray] = deque()
        self._ready: asyncio.Queue[tuple[Batch, bytearray] | BaseException] = asyncio.Queue()
        self._live: set[DirectLink] = set()
        self._lock = threading.Lock()
        self._stopped = False

    async def next(self) -> tuple[Batch, bytearray]:
        """Return the next batch and its buffer; raises what a thread met."""
        item = await self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def give_back(self, buffer: bytearray) -> None:
        """The batch was placed."""
        self._free.append(buffer)
        self._buffers.release()

    def stop(self) -> None:
        """End every thread soon."""
        with self._lock:
            self._stopped = True
            live = list(self._live)
        for link in live:
            link.close()
        for _ in range(LINKS):
            self._buffers.release()

    def receive(self) -> None:
        """Make requests on a connection of its own until none is left; never raises."""
        try:
            link = DirectLink(self._endpoint)
        except (OSError, DirectError, ValueError) as error:
            self._hand_over(error if isinstance(error, (OSError, DirectError)) else DirectError(str(error)))
            return
        try:
            with self._lock:
                if self._stopped:
                    return
                self._live.add(link)
            self._receive_all(link)
        except (OSError, DirectError, ValueError) as error:
            self._hand_over(error if isinstance(error, (OSError, DirectError)) else DirectError(str(error)))
        finally:
            link.close()
            with self._lock:
                self._live.discard(link)

    def _receive_all(self, link: DirectLink) -> None:
        asked = self._ask(link)
        while asked is not None:
            following = self._ask(link)
            link.begin_answer(sum(self._wanted[number] for batch in asked for number in batch))
            for batch in asked:
                self._buffers.acquire()
                if self._stopped:
                    return
                self._hand_over(self._fill(link, batch))
            asked = following

    def _ask(self, link: DirectLink) -> list[Numbers] | None:
        with self._lock:
            if self._stopped or not self._to_ask:
                return None
            batches = self._to_ask.popleft()
        numbers = ",".join(_ranges(itertools.chain.from_iterable(batches)))
        path = f"/v1/results/{self._address.job}/{self._address.attempt}/chunks?numbers={numbers}"
        link.ask(path, self._envelope())
        return batches

    def _fill(self, link: DirectLink, batch: Numbers) -> tuple[Batch, bytearray]:
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = bytearray(self._largest)
        return self._filled(link, batch, buffer), buffer

    def _filled(self, link: DirectLink, batch: Numbers, buffer: bytearray) -> Batch:
        view = memoryview(buffer)
        size = sum(self._wanted[number] for number in batch)
        link.read_into(view[:size])
        ends = list(itertools.accumulate(self._wanted[number] for number in batch))
        return [(n, view[end - self._wanted[n] : end].toreadonly()) for n, end in zip(batch, ends, strict=True)]

    def _hand_over(self, item: tuple[Batch, bytearray] | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._ready.put_nowait, item)


def _batches(wanted: Mapping[int, int]) -> list[Numbers]:
    """Return the chunks in their order, about `BATCH_BYTES` together."""
    found: list[Numbers] = []
    size = BATCH_BYTES
    for number in sorted(wanted):
        if size >= BATCH_BYTES:
            found.append([])
            size = 0
        found[-1].append(number)
        size += wanted[number]
    return found


def _ranges(numbers: Iterable[int]) -> list[str]:
    """Return numbers in rising order as a request names them."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]
