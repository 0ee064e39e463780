"""A real coordinator process beside a real nats-server, with a researcher and sites that speak the wire by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.ids import AttemptNumber, BootId, Digest, Epoch, FederationId, JobId, SiteId, job_id
from edif_mesh.domain.job import Limits
from edif_mesh.domain.site import Device, ModelOffer, ModelRef, ModelState, SiteStatus, Versions
from edif_mesh.errors import EdifError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import Identity, TrustStore
from edif_mesh.transport.nats_bus import Connection, connect
from edif_mesh.transport.ports import Incoming
from edif_mesh.wire import subjects
from edif_mesh.wire.codec import decode_as
from edif_mesh.wire.envelope import Opened, envelope_digest, open_envelope, seal
from edif_mesh.wire.messages import (
    Advert,
    AskJob,
    AttemptRef,
    CancelJob,
    Grant,
    JobSnapshot,
    LeaseRenewed,
    Order,
    PayloadRef,
    PlaceAttempt,
    Received,
    Refusal,
    Report,
    ReportReceived,
    Role,
    StopAttempt,
)
from tests.contract.nats_starter import NatsServer, free_port

ROOT = Path(__file__).parents[2]
FEDERATION = FederationId("test")
MODEL = "openai-community/gpt2"
VERSIONS = Versions(python="3.11.7", nnsight="0.8.1", torch="2.13.0", transformers="5.22.2")
M = TypeVar("M")


def now_ms() -> int:
    return int(time.time() * 1000)


async def eventually(check: Callable[[], Any], what: str, seconds: float = 15.0) -> Any:
    """Return the first true value of `check`, which may be a coroutine function."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = check()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        await asyncio.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


class Rig:
    """Folder, broker, keys, settings and the coordinator's process."""

    def __init__(self, folder: Path, sites: tuple[str, ...] = ("ansbach", "heilbronn"), policy: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.nats = NatsServer(folder)
        self.key, self.researcher = PrivateKey.generate(), PrivateKey.generate()
        self.site_keys = {name: PrivateKey.generate() for name in sites}
        self.trust = TrustStore(FEDERATION, self._identities(), folder / "trust.json")
        self.trust.enrol(self.trust.identities()[0])  # writes the file
        self.key.save(folder / "coordinator.pem")
        self.http = free_port()
        self.config = folder / "coordinator.toml"
        self.database = folder / "db" / "coordinator.db"
        self.write_config(policy)
        self.process: asyncio.subprocess.Process | None = None

    def _identities(self) -> tuple[Identity, ...]:
        sites = (Identity(key.public.hex(), Role.SITE, name) for name, key in self.site_keys.items())
        return (
            Identity(self.key.public.hex(), Role.COORDINATOR, "coordinator"),
            Identity(self.researcher.public.hex(), Role.RESEARCHER, "ada@example.org"),
            *sites,
        )

    def write_config(self, policy: str = "", extra: str = "") -> None:
        self.config.write_text(
            f'federation = "test"\nkey_file = "coordinator.pem"\ntrust_file = "trust.json"\n'
            f'database_url = "sqlite:///{self.database}"\nhttp_port = {self.http}\nlog_level = "DEBUG"\n{extra}\n'
            f'[broker]\nurl = "{self.nats.url}"\n[policy]\n{policy}\n'
            "[store]\norders_bytes = 16777216\npayloads_bytes = 16777216\nresults_bytes = 16777216\nlogs_bytes = 16777216\n"
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    async def start(self) -> dict[str, Any]:
        """Start the coordinator and return its ready line."""
        log = (self.folder / "coordinator.log").open("ab")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = (sys.executable, "-m", "coordinator", "run", "--config", str(self.config))
        self.process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=log
        )
        log.close()
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), 30)
        assert line, self.log()
        ready: dict[str, Any] = json.loads(line)
        return ready

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """End the coordinator and return its exit status."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        if process.returncode is None:
            process.send_signal(number)
        return await asyncio.wait_for(process.wait(), 15)

    def log(self) -> str:
        return (self.folder / "coordinator.log").read_text()

    async def connect(self, name: str) -> Connection:
        return await connect(self.nats.url, name=name)

    async def close(self) -> None:
        await self.stop(signal.SIGKILL)
        self.nats.kill()


class Researcher:
    """Signs and sends orders and questions."""

    def __init__(self, rig: Rig, connection: Connection, key: PrivateKey | None = None) -> None:
        self.rig, self.connection = rig, connection
        self.key = key or rig.researcher
        self.updates: list[JobSnapshot] = []
        self.refusals: list[Refusal] = []

    def order(self, **changes: Any) -> Order:
        now = now_ms()
        order = Order(
            federation=FEDERATION,
            job=job_id(now, secrets.randbits(48)),
            nonce=secrets.token_hex(8),
            issued_at_ms=now,
            not_before_ms=now - 1_000,
            expires_at_ms=now + 3_600_000,
            payload=PayloadRef(Digest("0" * 64), 3),
            model=ModelRef(MODEL),
            client=VERSIONS,
        )
        return replace(order, **changes)

    async def watch(self, job: JobId) -> None:
        """Collect the updates of a job."""

        async def updated(message: Incoming) -> None:
            try:
                self.updates.append(self.open(message.data, JobSnapshot).message)
            except EdifError:
                self.refusals.append(self.open(message.data, Refusal).message)

        await self.connection.bus.subscribe(subjects.job_updates(job), updated)

    async def send(self, envelope: str, key: PrivateKey | None = None) -> None:
        subject = subjects.order((key or self.key).id)
        await self.connection.streams.append(subject, envelope.encode(), message_id=secrets.token_hex(8))

    async def submit(self, **changes: Any) -> Order:
        order = self.order(**changes)
        await self.watch(order.job)
        await self.send(seal(order, self.key))
        return order

    async def ask(self, message: Any, expected: type[M]) -> M:
        raw = await self.connection.bus.request(subjects.ask(), seal(message, self.key).encode(), timeout_ms=3_000)
        return self.open(raw, expected).message

    async def job(self, job: JobId, *, explain: bool = False) -> JobSnapshot:
        return await self.ask(AskJob(job, now_ms(), explain), JobSnapshot)

    async def cancel(self, job: JobId) -> JobSnapshot:
        return await self.ask(CancelJob(job, now_ms()), JobSnapshot)

    async def until(self, job: JobId, status: str, seconds: float = 15.0) -> JobSnapshot:
        def found() -> JobSnapshot | None:
            return next((u for u in reversed(self.updates) if u.job == job and u.status == status), None)

        snapshot: JobSnapshot = await eventually(
            found, f"{job} {status}; saw {[u.status for u in self.updates]}", seconds
        )
        return snapshot

    def open(self, raw: bytes, expected: type[M]) -> Opened[M]:
        return open_envelope(raw, expected, self.rig.trust, now_ms())


class Site:
    """A site's end of the wire: adverts, journaled grants, reports; what it does not answer stays unanswered."""

    def __init__(self, rig: Rig, connection: Connection, name: str) -> None:
        self.rig, self.connection, self.name = rig, connection, SiteId(name)
        self.key = rig.site_keys[name]
        self.boot = BootId(secrets.token_hex(8))
        self.sequence = 0
        self.reports = 0
        self.answers = True
        self.placed: list[tuple[Grant, PlaceAttempt]] = []
        self.placement: asyncio.Queue[Grant] = asyncio.Queue()
        self.stopped: list[StopAttempt] = []
        self.held: dict[JobId, AttemptRef] = {}

    async def open(self) -> None:
        await self.connection.bus.subscribe(subjects.site_orders(self.name), self._told)

    async def _told(self, message: Incoming) -> None:
        try:
            place = decode_as(PlaceAttempt, message.data)
        except EdifError:
            self.stopped.append(open_envelope(message.data, StopAttempt, self.rig.trust, now_ms()).message)
        else:
            grant = open_envelope(place.grant, Grant, self.rig.trust, now_ms()).message
            assert envelope_digest(place.order) == grant.order_digest
            self.placed.append((grant, place))
            self.placement.put_nowait(grant)
            if self.answers:
                self.held[grant.job] = AttemptRef(grant.job, grant.attempt, AttemptStatus.ACCEPTED)
        if self.answers:
            answer = Received(self.name, self.boot, now_ms())
            await self.connection.bus.publish(message.reply, seal(answer, self.key).encode())

    def an_advert(self, **changes: Any) -> Advert:
        self.sequence += 1
        offer = ModelOffer(MODEL, "a" * 40, "text-generation", "float32", ModelState.LOADED, 1 << 20, 100)
        advert = Advert(
            site=self.name,
            boot=self.boot,
            sequence=self.sequence,
            issued_at_ms=now_ms(),
            valid_ms=15_000,
            status=SiteStatus.ACTIVE,
            country="DE",
            slots=4,
            free_slots=max(0, 4 - len(self.held)),
            memory_bytes=64 << 30,
            free_memory_bytes=60 << 30,
            devices=(Device("cpu", "test", 64 << 30, 60 << 30),),
            models=(offer,),
            versions=VERSIONS,
            limits=Limits(),
            attempts=tuple(self.held.values()),
            sandbox="test",
        )
        return replace(advert, **changes)

    async def advertise(self, **changes: Any) -> LeaseRenewed:
        return await self.request(subjects.advert(self.name), self.an_advert(**changes), LeaseRenewed)

    async def keep_advertising(self, every_s: float = 0.5) -> None:
        """Advertise until cancelled; a missing answer is met with the next advert."""
        while True:
            with contextlib.suppress(EdifError):
                await self.advertise()
            await asyncio.sleep(every_s)

    def a_report(self, grant: Grant, status: AttemptStatus, **changes: Any) -> Report:
        self.reports += 1
        report = Report(
            site=self.name,
            boot=self.boot,
            job=grant.job,
            attempt=AttemptNumber(grant.attempt),
            sequence=self.reports,
            status=status,
            issued_at_ms=now_ms(),
            order_digest=grant.order_digest,
            epoch=Epoch(grant.epoch),
        )
        return replace(report, **changes)

    async def report(self, grant: Grant, status: AttemptStatus, **changes: Any) -> ReportReceived:
        if status.terminal:
            self.held.pop(grant.job, None)
        return await self.request(subjects.report(self.name), self.a_report(grant, status, **changes), ReportReceived)

    async def request(self, subject: str, message: Any, expected: type[M]) -> M:
        raw = await self.connection.bus.request(subject, seal(message, self.key).encode(), timeout_ms=3_000)
        return open_envelope(raw, expected, self.rig.trust, now_ms()).message
