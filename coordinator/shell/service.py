"""The coordinator put together: takes the lead, recovers, listens, ticks, serves HTTP, and ends cleanly."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from coordinator.core.events import Event, LinkLost, LinkReturned, StoreMeasured, TermStarted, Ticked
from coordinator.monitoring.app import Monitoring
from coordinator.monitoring.metrics import Metrics
from coordinator.monitoring.server import HttpServer
from coordinator.shell.disconnects import watch_disconnects
from coordinator.shell.inbox import Inbox
from coordinator.shell.leadership import Leadership
from coordinator.shell.loop import Arrival, Loop
from coordinator.shell.opening import Opener
from coordinator.shell.outbox import Outbox
from coordinator.shell.reading import Reading
from coordinator.shell.recovery import recover
from coordinator.storage.store import Store
from edif_mesh.config import CoordinatorConfig, StoreConfig
from edif_mesh.domain.ids import Epoch
from edif_mesh.domain.job import Failure
from edif_mesh.errors import EdifError, TransportError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import TrustStore
from edif_mesh.transport.ports import Bus, Streams
from edif_mesh.wire import subjects

log = logging.getLogger(__name__)

ENSURE_RETRY_S = 0.5
MEASURE_S = 3.0
FULL_FROM, FREE_AGAIN = 0.95, 0.9


def now_ms() -> int:
    """Return the wall clock, Unix ms."""
    return time.time_ns() // 1_000_000


class Service:
    """One term of one coordinator."""

    def __init__(
        self,
        config: CoordinatorConfig,
        key: PrivateKey,
        trust: TrustStore,
        bus: Bus,
        streams: Streams,
        system: Bus | None = None,
    ) -> None:
        """Take the lock, open the record, begin a term and recover; blocking.

        Raises ConfigError (another coordinator leads, a database or an address of no use), RecordError.
        """
        self._config, self._bus, self._streams, self._system = config, bus, streams, system
        self._leadership = Leadership(config.database_url)
        try:
            self._store = Store(config.database_url)
            self.epoch: Epoch = self._store.begin_term(now_ms(), self._leadership.holder)
            state = recover(self._store, config.federation, config.policy, config.store, now_ms())
        except BaseException:
            self._leadership.release()
            raise
        opener, metrics = Opener(trust), Metrics()
        self._outbox = Outbox(
            bus, streams, key, opener, state, now_ms, self._happened, repeat_ms=config.policy.grant_repeat_ms
        )
        self._loop = Loop(state, self._store, metrics, now_ms, self._outbox.send)
        self._inbox = Inbox(self._loop, opener, self._outbox, self._store, metrics, now_ms)
        self._reading = Reading(self._loop, self._store, bus, now_ms)
        self._monitoring = Monitoring(self._reading, metrics, config.http_host)
        self._http: HttpServer | None = None
        self._running: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def url(self) -> str:
        """Where the page is."""
        return self._http.url if self._http is not None else ""

    async def start(self) -> None:
        """Begin the term, listen, serve. Raises ConfigError, TransportError."""
        self._http = HttpServer(self._monitoring, self._config.http_host, self._config.http_port)
        self._running = asyncio.create_task(self._loop.run(), name="loop")
        started = asyncio.Event()
        reasons: list[Failure] = []

        def settled(failure: Failure | None) -> None:
            reasons.extend([failure] if failure else [])
            started.set()

        # The epoch has to be in the state before anything is signed with it.
        await self._loop.put(Arrival(TermStarted(self.epoch), settled))
        await self._until(started)
        await self._ensure()
        self._bus.on_link(self._on_link)
        await self._inbox.start(self._bus, self._streams)
        if self._system is not None:
            await watch_disconnects(self._system, self._happened)
        self._tasks.append(asyncio.create_task(self._tick(), name="ticks"))
        self._tasks.append(asyncio.create_task(self._measure(), name="room at the broker"))
        await self._http.start()
        self._reading.recovered = True
        log.info("leading", extra={"epoch": self.epoch, "jobs": len(self._loop.state.jobs), "http": self.url})

    async def run_until(self, stop: asyncio.Event) -> EdifError | None:
        """Serve until `stop`; returns the error that ended the term before, if one did."""
        assert self._running is not None
        waiter = asyncio.create_task(stop.wait())
        await asyncio.wait({waiter, self._running}, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if not self._running.done():
            log.info("stopping")
            return None
        error = self._running.exception()
        if isinstance(error, EdifError):
            log.error("term ended", extra={"reason": str(error)})
            return error
        log.critical("the loop broke", exc_info=error)
        return EdifError(f"The coordinator's loop broke ({error!r}); start it again: it goes on from its record.")

    async def close(self) -> None:
        """Stop listening, finish what is recorded, close the record and give up the lead."""
        await self._inbox.close()
        for task in [*self._tasks, *([self._running] if self._running else [])]:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
        await self._outbox.close()
        if self._http is not None:
            await self._http.close()
        self._loop.close()
        self._store.close()
        self._leadership.release()

    async def _until(self, event: asyncio.Event) -> None:
        """Wait for `event`, or raise what ended the loop."""
        assert self._running is not None
        waiter = asyncio.create_task(event.wait())
        await asyncio.wait({waiter, self._running}, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if self._running.done():
            self._running.result()

    def _happened(self, event: Event) -> None:
        if not self._loop.offer(Arrival(event)):
            log.warning("event dropped: too many wait", extra={"kind": type(event).__name__})

    def _on_link(self, connected: bool) -> None:
        log.warning("link returned" if connected else "link lost")
        self._happened(LinkReturned() if connected else LinkLost())
        if connected:
            self._tasks = [task for task in self._tasks if not task.done()]
            self._tasks.append(asyncio.create_task(self._ensure(), name="ensure streams"))

    async def _ensure(self) -> None:
        """Create the streams, as often as it takes: the broker may have come back without its data."""
        while True:
            try:
                keep_ms = int(self._config.store.keep_results_days * subjects.DAY_MS)
                await self._streams.ensure(subjects.streams(keep_ms), max_bytes=_max_bytes(self._config.store))
                return
            except TransportError as error:
                log.warning("streams not ensured yet", extra={"reason": str(error)})
                await asyncio.sleep(ENSURE_RETRY_S)

    async def _measure(self) -> None:
        """Look how full the broker's streams are; what is full refuses new orders until a tenth of it is free again."""
        full = ""
        # Printed lines are not counted: who prints much must not keep others from ordering.
        most = {name: size for name, size in _max_bytes(self._config.store).items() if name != subjects.LOGS_STREAM}
        while True:
            try:
                used = {name: await self._streams.used_bytes(name) for name in most}
            except TransportError as error:
                log.debug("room at the broker not measured", extra={"reason": str(error)})
            else:
                share = FREE_AGAIN if full else FULL_FROM
                crowded = {name: used[name] for name in most if used[name] >= share * most[name]}
                now = _full_sentence(crowded, most) if crowded else ""
                if now != full:
                    full = now
                    log.warning("room at the broker", extra={"full": full or "there is room again"})
                    self._happened(StoreMeasured(full))
            await asyncio.sleep(MEASURE_S)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._config.policy.tick_ms / 1000)
            self._loop.offer(Arrival(Ticked()))


def _full_sentence(used: dict[str, int], most: dict[str, int]) -> str:
    parts = [f"{name} has {used[name] / 1e9:,.2f} of {most[name] / 1e9:,.2f} GB" for name in used]
    return (
        f"The mesh's store is nearly full ({', '.join(parts)}), so it takes no new orders; accepted ones go on. Delete results that "
        "you do not need (edif rm JOB), try again later, or ask the coordinator's operator for more room ([store] in its settings)."
    )


def _max_bytes(store: StoreConfig) -> dict[str, int]:
    return {
        subjects.ORDERS_STREAM: store.orders_bytes,
        subjects.PAYLOADS_STREAM: store.payloads_bytes,
        subjects.RESULTS_STREAM: store.results_bytes,
        subjects.LOGS_STREAM: store.logs_bytes,
    }
