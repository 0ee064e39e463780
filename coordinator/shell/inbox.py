"""What arrives: opened, checked, made into events. Poisonous bytes are counted and answered, and stop nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from coordinator.core.events import (
    AdvertReceived,
    CancelRequested,
    DeletionAsked,
    Event,
    JobAsked,
    JobsAsked,
    MeshAsked,
    OrderReceived,
    SiteReported,
)
from coordinator.core.state import MeshState
from coordinator.monitoring.metrics import Metrics
from coordinator.shell.loop import Arrival, Loop
from coordinator.shell.opening import Opener, Question, claimed_job, failure_of
from coordinator.shell.outbox import Outbox
from coordinator.shell.recovery import History, recall
from coordinator.storage.errors import RecordError
from coordinator.storage.store import Store
from edif_mesh.domain.ids import JobId, is_job_id
from edif_mesh.domain.job import Failure
from edif_mesh.errors import EdifError, TrustError, WireError
from edif_mesh.transport.ports import Bus, Delivery, Incoming, Streams, Subscription
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import Opened
from edif_mesh.wire.messages import Advert, AskJob, AskJobs, AskMesh, CancelJob, DeleteJob, Order, Refusal

log = logging.getLogger(__name__)

DURABLE = "coordinator"
ORDERS_IN_FLIGHT = 64
RETRY_MS = 1_000


class Inbox:
    """Subscribes to everything that is addressed to the coordinator."""

    def __init__(
        self, loop: Loop, opener: Opener, outbox: Outbox, store: Store, metrics: Metrics, now_ms: Callable[[], int]
    ) -> None:
        self._loop, self._opener, self._outbox, self._store = loop, opener, outbox, store
        self._metrics, self._now_ms = metrics, now_ms
        self._state: MeshState = loop.state
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, bus: Bus, streams: Streams) -> None:
        """Subscribe; raises TransportError."""
        for subject, handler in (
            (subjects.ALL_ADVERTS, self._on_advert),
            (subjects.ALL_REPORTS, self._on_report),
            (subjects.ask(), self._on_question),
        ):
            self._subscriptions.append(await bus.subscribe(subject, handler))
        consumer = await streams.consume(subjects.ORDERS_STREAM, DURABLE, self._on_order, in_flight=ORDERS_IN_FLIGHT)
        self._subscriptions.append(consumer)

    async def close(self) -> None:
        """Stop receiving; idempotent."""
        while self._subscriptions:
            await self._subscriptions.pop().close()
        for task in self._tasks:
            task.cancel()

    # ------------------------------------------------------------------------------------------------- handlers

    async def _on_order(self, delivery: Delivery) -> None:
        """An order is done at the broker once it is recorded or refused."""
        try:
            opened = self._opener.open(delivery.data, Order, self._now_ms())
            if not is_job_id(opened.message.job):
                raise WireError(f"{opened.message.job[:40]!r} is no job id.")
        except EdifError as error:
            self._refused("order", error)
            job = claimed_job(delivery.data)
            # Whoever watches a job that is known must not be misled by bytes that nobody vouches for.
            if job is not None and job not in self._state.jobs:
                self._outbox.refuse(job, Refusal(failure_of(error), job))
            await delivery.done()
            return
        order = opened.message
        event = OrderReceived(
            order=order,
            digest=opened.digest,
            envelope=delivery.data.decode(),
            owner=opened.key,
            owner_name=opened.identity.name,
            organisation=opened.identity.organisation,
        )

        def settled(failure: Failure | None) -> None:
            self._start(delivery.done() if failure is None else delivery.again(RETRY_MS))

        try:
            recalled = await self._recall(order.job)
        except RecordError:
            await delivery.again(RETRY_MS)
            return
        await self._loop.put(Arrival(event, settled, recalled))

    async def _on_advert(self, message: Incoming) -> None:
        try:
            opened = self._opener.open(message.data, Advert, self._now_ms(), fresh=True)
            site = opened.message.site
            if opened.identity.name != site or message.subject != subjects.advert(site):
                raise TrustError(f"{opened.identity.name} may not advertise for {site} on {message.subject}.")
        except EdifError as error:
            self._refuse(message, "advert", error)
            return
        self._offer(message, AdvertReceived(opened.message, message.reply))

    async def _on_report(self, message: Incoming) -> None:
        try:
            opened, manifest = self._opener.open_report(message.data, self._now_ms())
            recalled = await self._recall(opened.message.job)
        except EdifError as error:
            self._refuse(message, "report", error)
            return
        self._offer(message, SiteReported(opened.message, manifest, message.reply), recalled)

    async def _on_question(self, message: Incoming) -> None:
        try:
            opened = self._opener.open_question(message.data, self._now_ms())
            event = _event_of(opened, message.reply)
            recalled = (
                await self._recall(event.job) if isinstance(event, JobAsked | CancelRequested | DeletionAsked) else None
            )
        except EdifError as error:
            self._refuse(message, "question", error)
            return
        self._offer(message, event, recalled)

    # -------------------------------------------------------------------------------------------------- helpers

    def _offer(self, message: Incoming, event: Event, recalled: History | None = None) -> None:
        def settled(failure: Failure | None) -> None:
            # A site keeps what was not answered and repeats it; a person is told at once.
            if failure is not None and not isinstance(event, SiteReported | AdvertReceived):
                self._outbox.answer(message.reply, Refusal(failure))

        if not self._loop.offer(Arrival(event, settled, recalled)):
            settled(Failure("busy", "The coordinator has too much to do just now. Try again in a moment."))
            self._metrics.refused.labels("busy").inc()

    async def _recall(self, job: JobId) -> History | None:
        """Return what the record has of a job that is not in memory, so that an ended job is never taken for a new one."""
        if self._loop.all_in_memory or job in self._state.jobs or not is_job_id(job):
            return None
        return await asyncio.to_thread(recall, self._store, job)

    def _refuse(self, message: Incoming, what: str, error: EdifError) -> None:
        self._refused(what, error)
        self._outbox.answer(message.reply, Refusal(failure_of(error)))

    def _refused(self, what: str, error: EdifError) -> None:
        self._metrics.refused.labels(error.code).inc()
        log.warning("message refused", extra={"what": what, "code": error.code, "reason": str(error)[:300]})

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _event_of(opened: Opened[Any], reply: str) -> JobAsked | JobsAsked | MeshAsked | CancelRequested | DeletionAsked:
    message: Question = opened.message
    match message:
        case AskJob():
            return JobAsked(message.job, opened.key, message.explain, reply)
        case AskJobs():
            return JobsAsked(opened.key, message.limit, reply)
        case AskMesh():
            return MeshAsked(reply)
        case CancelJob():
            return CancelRequested(message.job, opened.key, message.reason, reply)
        case DeleteJob():
            return DeletionAsked(message.job, opened.key, reply)
