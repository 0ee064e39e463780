"""Signs and sends what is recorded. Nothing here is durable: the core repeats what was not answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, assert_never

from coordinator.core.decision import (
    Draft,
    Outgoing,
    PublishJob,
    PublishRefusal,
    PurgeJob,
    PurgePayload,
    Reply,
    SendGrant,
    SendStop,
)
from coordinator.core.events import Event, GrantAnswered, GrantUndelivered, JobPurged
from coordinator.core.snapshot import snapshot
from coordinator.core.state import MeshState
from coordinator.shell.opening import Opener
from edif_mesh.domain.ids import AttemptNumber, JobId, SiteId
from edif_mesh.domain.job import JobStatus
from edif_mesh.errors import EdifError, NobodyListensError, TransportError, TrustError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.transport.ports import Bus, Streams
from edif_mesh.wire import subjects
from edif_mesh.wire.codec import encode
from edif_mesh.wire.envelope import seal
from edif_mesh.wire.messages import JobList, JobSnapshot, Message, PlaceAttempt, Received, Refusal

log = logging.getLogger(__name__)

MAX_ENVELOPE_BYTES = 480 << 10
PURGE_TRIES = 5
PURGE_AGAIN_S = 2.0


class Outbox:
    """Everything that leaves the coordinator."""

    def __init__(
        self,
        bus: Bus,
        streams: Streams,
        key: PrivateKey,
        opener: Opener,
        state: MeshState,
        now_ms: Callable[[], int],
        happened: Callable[[Event], None],
        *,
        repeat_ms: int,
    ) -> None:
        """`happened` takes the events that answers make; it must not block."""
        self._bus, self._streams, self._key, self._opener = bus, streams, key, opener
        self._state, self._now_ms, self._happened = state, now_ms, happened
        self._repeat_ms = repeat_ms
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way: set[tuple[object, ...]] = set()

    def send(self, sends: Sequence[Outgoing]) -> None:
        """Start to send all of it, in order; never blocks and never raises."""
        for item in sends:
            match item:
                case SendGrant(grant):
                    self._once(("grant", grant.job, grant.attempt), self._grant(item))
                case SendStop(stop):
                    self._once(("stop", stop.job, stop.attempt), self._stop(item))
                case Reply(reply_to, message):
                    self.answer(reply_to, message)
                case PublishJob(job):
                    self._publish_job(job)
                case PublishRefusal(job, refusal):
                    self._refuse_order(job, refusal)
                case PurgePayload(job):
                    self._once(("purge", job), self._purge(job))
                case PurgeJob(job):
                    self._once(("purge all", job), self._purge_all(job))
                case _:
                    assert_never(item)

    def answer(self, reply_to: str, message: Message) -> None:
        """Sign and answer; the asker repeats a question whose answer is lost."""
        if reply_to:
            self._start(self._publish(reply_to, self._sealed(message)))

    def refuse(self, job: JobId, refusal: Refusal) -> None:
        """Tell whoever watches `job` that its order was not accepted."""
        self._start(self._publish(subjects.job_updates(job), seal(refusal, self._key).encode()))

    async def close(self) -> None:
        """Give what was started a moment to leave."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=1)
            for task in late:
                task.cancel()

    def _publish_job(self, job: JobId) -> None:
        record = self._state.jobs.get(job)
        if record is not None:
            message = snapshot(Draft(self._state, self._now_ms()), record)
            self._start(self._publish(subjects.job_updates(job), self._sealed(message)))

    def _refuse_order(self, job: JobId, refusal: Refusal) -> None:
        """Refuse an order, unless a job of that id is recorded: its owner watches, and this was another's order."""
        if job in self._state.jobs:
            log.warning("order refused", extra={"job": job, "code": refusal.failure.code})
        else:
            self.refuse(job, refusal)

    async def _publish(self, subject: str, data: bytes) -> None:
        try:
            await self._bus.publish(subject, data)
        except TransportError as error:
            log.debug("not published", extra={"subject": subject, "reason": str(error)})

    async def _grant(self, item: SendGrant) -> None:
        grant = item.grant
        place = encode(PlaceAttempt(seal(grant, self._key), item.order))
        try:
            received = await self._ask_site(grant.site, place)
        except NobodyListensError:
            self._happened(GrantUndelivered(grant.job, grant.attempt, grant.site))
        except EdifError as error:
            log.info("grant not answered", extra={"job": grant.job, "site": grant.site, "reason": str(error)})
        else:
            self._happened(GrantAnswered(grant.job, grant.attempt, grant.site, received.boot))

    async def _stop(self, item: SendStop) -> None:
        try:
            await self._ask_site(item.stop.site, seal(item.stop, self._key).encode())
        except EdifError as error:
            log.info("stop not answered", extra={"job": item.stop.job, "site": item.stop.site, "reason": str(error)})

    async def _ask_site(self, site: SiteId, data: bytes) -> Received:
        raw = await self._bus.request(subjects.site_orders(site), data, timeout_ms=self._repeat_ms)
        opened = self._opener.open(raw, Received, self._now_ms(), fresh=True)
        if not opened.identity.name == opened.message.site == site:
            raise TrustError(f"{opened.identity.name} answered for {site}.")
        return opened.message

    async def _purge(self, job: JobId) -> None:
        wanted = [(subjects.PAYLOADS_STREAM, subjects.payload_chunks(job)), *self._left_over(job)]
        for tried in range(PURGE_TRIES):
            try:
                for stream, subject in wanted:
                    await self._streams.purge(stream, subject)
                return
            except TransportError as error:
                log.info("ended job not purged yet", extra={"job": job, "reason": str(error)})
                await asyncio.sleep(2**tried)

    def _left_over(self, job: JobId) -> list[tuple[str, str]]:
        """The chunks of attempts that did not become the result: values leave early, also those of an attempt that failed."""
        record = self._state.jobs.get(job)
        if record is None:
            return []
        kept = record.attempt if record.status is JobStatus.SUCCEEDED else 0
        numbers = (AttemptNumber(number) for number in range(1, record.attempt + 1) if number != kept)
        return [(subjects.RESULTS_STREAM, subjects.result_chunks(job, number)) for number in numbers]

    async def _purge_all(self, job: JobId) -> None:
        """Delete all that the broker holds of a job, and say so; the core asks again when it could not be done."""
        try:
            for stream, subject in (
                (subjects.PAYLOADS_STREAM, subjects.payload_chunks(job)),
                (subjects.RESULTS_STREAM, subjects.result_chunks(job)),
                (subjects.LOGS_STREAM, subjects.all_log_lines(job)),
            ):
                await self._streams.purge(stream, subject)
        except TransportError as error:
            log.info("job not purged yet", extra={"job": job, "reason": str(error)})
            await asyncio.sleep(PURGE_AGAIN_S)
        else:
            self._happened(JobPurged(job))
            await asyncio.sleep(PURGE_AGAIN_S)  # until the core has heard it: it asks at every tick

    def _sealed(self, message: Message) -> bytes:
        """Sign; a list or a verdict that would not fit a message is cut, newest jobs and first sites kept."""
        while True:
            data = seal(message, self._key).encode()
            if len(data) <= MAX_ENVELOPE_BYTES:
                return data
            if isinstance(message, JobList) and len(message.jobs) > 1:
                message = replace(message, jobs=message.jobs[: len(message.jobs) // 2])
            elif isinstance(message, JobSnapshot) and message.why:
                message = replace(message, why=message.why[: len(message.why) // 2])
            else:
                return data

    def _once(self, key: tuple[object, ...], work: Coroutine[Any, Any, None]) -> None:
        """Start `work` unless the same is still under way."""
        if key in self._under_way:
            work.close()
            return
        self._under_way.add(key)
        self._start(work).add_done_callback(lambda _: self._under_way.discard(key))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
