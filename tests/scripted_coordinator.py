"""A coordinator that says what a test tells it to, on a real broker, and a client that believes its key."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edif_mesh.client.job import Job, now_ms
from edif_mesh.config import BrokerConfig, ClientConfig
from edif_mesh.domain.ids import AttemptNumber, Epoch, FederationId, JobId, SiteId
from edif_mesh.domain.job import Failure, JobStatus
from edif_mesh.domain.site import ModelRef
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import Identity, TrustStore
from edif_mesh.transport.nats_bus import Connection, connect
from edif_mesh.transport.ports import Delivery, Incoming
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import envelope_digest, kind_of, open_envelope, seal
from edif_mesh.wire.messages import AskJob, JobSnapshot, LogLines, Message, Order, Refusal, Role
from tests.contract.nats_starter import NatsServer, free_port

FEDERATION, SITE = FederationId("fed"), SiteId("ansbach")


class ScriptedCoordinator:
    """Records orders; answers questions with `snapshots`, or that it knows no such job."""

    def __init__(self, folder: Path, server: NatsServer) -> None:
        self.server, self.folder = server, folder
        self.key, self.site, self.researcher = (PrivateKey.generate() for _ in range(3))
        self.orders: list[tuple[Order, str]] = []
        self.snapshots: dict[JobId, JobSnapshot] = {}
        self.records = True
        """Whether a new order becomes a QUEUED snapshot."""
        self.asked = 0
        self.news = asyncio.Condition()
        self.link: Connection

    async def start(self) -> None:
        self.link = await connect(self.server.url, name="coordinator")
        await self.link.streams.ensure(subjects.STREAMS, max_bytes={spec.name: 1 << 28 for spec in subjects.STREAMS})
        await self.link.streams.consume(subjects.ORDERS_STREAM, "coordinator", self._ordered)
        await self.link.bus.subscribe(subjects.ask(), self._asked)

    def config(self) -> ClientConfig:
        """Write the researcher's key and trust store once, and return the settings."""
        key_file, trust_file = self.folder / "key.pem", self.folder / "trust.json"
        if not key_file.exists():
            self.researcher.save(key_file)
            trust = TrustStore(FEDERATION, (), trust_file)
            for key, role, name in (
                (self.key, Role.COORDINATOR, "hub"),
                (self.site, Role.SITE, SITE),
                (self.researcher, Role.RESEARCHER, "ada@example.org"),
            ):
                trust.enrol(Identity(key.public.hex(), role, name))
        return ClientConfig(FEDERATION, key_file, trust_file, self.folder / "outbox", BrokerConfig(url=self.server.url))

    async def until(self, what: Callable[[], Any]) -> None:
        async with asyncio.timeout(20), self.news:
            await self.news.wait_for(what)

    def snapshot(self, job: JobId, version: int, status: JobStatus, **changes: Any) -> JobSnapshot:
        base = JobSnapshot(
            job, version, status, status.value, ModelRef("m"), self.researcher.id, 1, 1, now_ms() + 60_000
        )
        return replace(base, epoch=Epoch(1), **changes)

    async def tell(self, message: Message, job: JobId, key: PrivateKey | None = None) -> None:
        """Publish on the job's subject, as whoever `key` is."""
        await self.link.bus.publish(subjects.job_updates(job), seal(message, key or self.key).encode())

    async def print(self, job: JobId, first: int, *lines: str, key: PrivateKey | None = None) -> None:
        """Store lines as the site does."""
        message = LogLines(job, AttemptNumber(1), SITE, first, lines, now_ms())
        subject = subjects.log_lines(job, AttemptNumber(1))
        await self.link.streams.append(
            subject, seal(message, key or self.site).encode(), message_id=secrets.token_hex(8)
        )

    async def _ordered(self, delivery: Delivery) -> None:
        text = delivery.data.decode()
        trust = TrustStore(FEDERATION, (Identity(self.researcher.public.hex(), Role.RESEARCHER, "ada"),))
        order = open_envelope(text, Order, trust, now_ms()).message
        await delivery.done()
        async with self.news:
            self.orders.append((order, envelope_digest(text)))
            self.news.notify_all()
        if self.records and order.job not in self.snapshots:  # a killed broker delivers an order again
            self.snapshots[order.job] = self.snapshot(order.job, 1, JobStatus.QUEUED)
            await self.tell(self.snapshots[order.job], order.job)

    async def _asked(self, incoming: Incoming) -> None:
        assert kind_of(incoming.data) == "ask_job"
        trust = TrustStore(FEDERATION, (Identity(self.researcher.public.hex(), Role.RESEARCHER, "ada"),))
        job = open_envelope(incoming.data, AskJob, trust, now_ms()).message.job
        answer: Message = self.snapshots.get(job) or Refusal(Failure("not_found", f"There is no job {job} here."), job)
        await self.link.bus.publish(incoming.reply, seal(answer, self.key).encode())
        async with self.news:
            self.asked += 1
            self.news.notify_all()


@asynccontextmanager
async def scripted(folder: Path) -> AsyncIterator[ScriptedCoordinator]:
    """Start a broker and a scripted coordinator."""
    server = NatsServer(folder, extra=f"http_port: {free_port()}")
    server.start()
    try:
        coordinator = ScriptedCoordinator(folder, server)
        await coordinator.start()
        yield coordinator
        await coordinator.link.close()
    finally:
        server.kill()


async def watched(job: Job, until: Callable[[list[JobSnapshot]], bool] = lambda _: False) -> list[JobSnapshot]:
    """Everything that `job.watch()` yields, to its end or until told."""
    seen: list[JobSnapshot] = []
    async with asyncio.timeout(30):
        async for snapshot in job.watch():
            seen.append(snapshot)
            if until(seen):
                break
    return seen
