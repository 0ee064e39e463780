"""A coordinator played by a test, with real keys on a real broker, and a real agent process that believes it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.ids import AttemptNumber, Digest, Epoch, FederationId, SiteId, job_id
from edif_mesh.domain.job import Limits
from edif_mesh.domain.site import ModelRef, ModelState, Versions
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import Identity, TrustStore
from edif_mesh.transport.nats_bus import Connection, connect
from edif_mesh.transport.ports import Incoming
from edif_mesh.wire import subjects
from edif_mesh.wire.codec import encode
from edif_mesh.wire.envelope import envelope_digest, open_envelope, seal
from edif_mesh.wire.messages import (
    Advert,
    AttemptLease,
    Grant,
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
from edif_mesh.wire.subjects import STREAMS
from tests import models, traces
from tests.contract.nats_starter import NatsServer

FEDERATION, SITE = FederationId("fed"), SiteId("ansbach")
ROOT = Path(__file__).resolve().parent.parent


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Keys:
    """Everybody's keys, and the trust store file of the site."""

    def __init__(self, folder: Path) -> None:
        self.coordinator, self.researcher, self.site, self.stranger, self.revoked, self.gpt2_only = (
            PrivateKey.generate() for _ in range(6)
        )
        self.file, self.trust_file = folder / "site.key", folder / "trust.json"
        self.site.save(self.file)
        self.trust = TrustStore(
            FEDERATION,
            (
                Identity(self.coordinator.public.hex(), Role.COORDINATOR, "hub"),
                Identity(self.researcher.public.hex(), Role.RESEARCHER, "ada@example.org"),
                Identity(self.site.public.hex(), Role.SITE, SITE),
                Identity(self.revoked.public.hex(), Role.RESEARCHER, "eve@example.org", revoked_at_ms=1),
                Identity(self.gpt2_only.public.hex(), Role.RESEARCHER, "bob@example.org", models=(models.GPT2,)),
            ),
            self.trust_file,
        )
        self.trust.enrol(self.trust.identities()[0])


class PlayedCoordinator:
    """Answers adverts and reports like an honest coordinator; what it sends besides is up to the test."""

    def __init__(self, keys: Keys, link: Connection) -> None:
        self.keys, self.link = keys, link
        self.epoch = Epoch(1)
        self.reports: list[Report] = []
        self.adverts: list[Advert] = []
        self.forgotten: set[tuple[str, int]] = set()
        """Attempts that its answers to adverts no longer name."""
        self.acknowledges = self.renews = True
        self.at: dict[tuple[str, int, AttemptStatus], float] = {}
        self._news = asyncio.Condition()

    async def listen(self) -> None:
        await self.link.streams.ensure(
            STREAMS,
            max_bytes={spec.name: (2 << 30) if spec.name == subjects.RESULTS_STREAM else 256 << 20 for spec in STREAMS},
        )
        await self.link.bus.subscribe(subjects.ALL_ADVERTS, self._advert, concurrent=4)
        await self.link.bus.subscribe(subjects.ALL_REPORTS, self._report, concurrent=4)

    # ------------------------------------------------------------------------------------------ orders and grants

    async def order(self, stored: bytes = b"payload", **changes: Any) -> Order:
        """An order for the tiny model, valid from now, whose payload is stored."""
        job = job_id(now_ms(), secrets.randbits(48))
        if stored:
            await self.link.streams.append(subjects.payload_chunk(job, 0), stored, message_id=f"{job}.0")
        base = Order(
            federation=FEDERATION,
            job=job,
            nonce=secrets.token_hex(8),
            issued_at_ms=now_ms(),
            not_before_ms=now_ms(),
            expires_at_ms=now_ms() + 3_600_000,
            payload=PayloadRef(Digest(hashlib.sha256(stored).hexdigest()), len(stored)),
            model=ModelRef(models.TINY),
            client=Versions(),
            limits=Limits(wall_ms=60_000, memory_bytes=1 << 30, result_bytes=1 << 30),
        )
        return replace(base, **changes)

    def grant(self, order: Order, envelope: str, **changes: Any) -> Grant:
        base = Grant(
            order_digest=envelope_digest(envelope),
            job=order.job,
            site=SITE,
            attempt=AttemptNumber(1),
            epoch=self.epoch,
            issued_at_ms=now_ms(),
            lease_ms=30_000,
            expires_at_ms=now_ms() + 60_000,
        )
        return replace(base, **changes)

    def sign_order(self, order: Order, key: PrivateKey | None = None) -> str:
        return seal(order, key or self.keys.researcher)

    async def place(
        self, order: Order, envelope: str | None = None, *, key: PrivateKey | None = None, **changes: Any
    ) -> Received | Refusal:
        """Grant `order` and send both; `changes` are fields of the grant, `key` signs it."""
        envelope = envelope or self.sign_order(order)
        grant = seal(self.grant(order, envelope, **changes), key or self.keys.coordinator)
        return await self.send(encode(PlaceAttempt(grant, envelope)))

    async def stop(self, order: Order, attempt: int = 1, reason: str = "cancelled") -> Received | Refusal:
        stop = StopAttempt(order.job, AttemptNumber(attempt), SITE, self.epoch, now_ms(), reason)
        return await self.send(seal(stop, self.keys.coordinator).encode())

    async def send(self, raw: bytes) -> Received | Refusal:
        answer = await self.link.bus.request(subjects.site_orders(SITE), raw, timeout_ms=5_000)
        kind = "refusal" if b"edif.refusal" in answer else "received"
        expected: Any = Refusal if kind == "refusal" else Received
        opened = open_envelope(answer, expected, self.keys.trust, now_ms(), fresh=kind == "received")
        assert opened.key == self.keys.site.id
        return opened.message  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------------ what came back

    async def until(self, what: Callable[[], Any], timeout_s: float = 30) -> Any:
        """Wait until `what()` is true and return it; checked at every advert and report."""
        async with asyncio.timeout(timeout_s), self._news:
            while not (found := what()):
                await self._news.wait()
            return found

    async def ended(self, order: Order, attempt: int = 1, timeout_s: float = 30) -> Report:
        """Wait for the attempt's last report."""
        report = await self.until(
            lambda: [r for r in self.reports_of(order, attempt) if r.status.terminal], timeout_s=timeout_s
        )
        return report[0]  # type: ignore[no-any-return]

    async def running(self, order: Order, attempt: int = 1) -> None:
        await self.until(lambda: AttemptStatus.RUNNING in [r.status for r in self.reports_of(order, attempt)])

    def reports_of(self, order: Order, attempt: int = 1) -> list[Report]:
        return [report for report in self.reports if (report.job, report.attempt) == (order.job, attempt)]

    async def loaded(self) -> None:
        """Wait until the newest advert offers the tiny model as loaded."""
        await self.until(
            lambda: (
                self.adverts
                and any(
                    offer.repo_id == models.TINY and offer.state is ModelState.LOADED
                    for offer in self.adverts[-1].models
                )
            ),
            timeout_s=120,
        )

    async def quiet(self) -> None:
        """Wait for an advert with a number that is given after this call: everything sent before has been handled."""
        last = self.adverts[-1].sequence if self.adverts else 0
        await self.until(lambda: self.adverts and self.adverts[-1].sequence > last + 1)

    async def _advert(self, incoming: Incoming) -> None:
        advert = open_envelope(incoming.data, Advert, self.keys.trust, now_ms(), fresh=True).message
        leases = tuple(
            AttemptLease(item.job, item.attempt)
            for item in advert.attempts
            if (item.job, item.attempt) not in self.forgotten
        )
        renewal = LeaseRenewed(advert.site, self.epoch, advert.sequence, now_ms(), 30_000, leases)
        if self.renews:
            await self.link.bus.publish(incoming.reply, seal(renewal, self.keys.coordinator).encode())
        async with self._news:
            self.adverts.append(advert)
            self._news.notify_all()

    async def _report(self, incoming: Incoming) -> None:
        report = open_envelope(incoming.data, Report, self.keys.trust, now_ms(), fresh=True).message
        self.at.setdefault((report.job, report.attempt, report.status), time.perf_counter())
        if self.acknowledges:
            answer = ReportReceived(
                report.site, report.job, report.attempt, report.sequence, self.epoch, now_ms(), result_committed=True
            )
            await self.link.bus.publish(incoming.reply, seal(answer, self.keys.coordinator).encode())
        async with self._news:
            self.reports.append(report)
            self._news.notify_all()


class AgentProcess:
    """One `edif-site run` over a settings file of its own."""

    def __init__(self, folder: Path, keys: Keys, server: NatsServer, more: str = "", **settings: object) -> None:
        self.folder, self.config, self.state = folder, folder / "site.toml", folder / "state"
        self.process: subprocess.Popen[bytes] | None = None
        values: dict[str, object] = {"slots": 2, "ready_children": 2, "advert_ms": 300, "country": "DE"} | settings
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
        self.config.write_text(
            f'federation = "{FEDERATION}"\nsite = "{SITE}"\nkey_file = "{keys.file}"\n'
            f'trust_file = "{keys.trust_file}"\nstate_dir = "{self.state}"\nhf_cache = "{models.cache()}"\n'
            f"memory_bytes = {8 << 30}\n" + "\n".join(lines) + f'\n[broker]\nurl = "{server.url}"\n'
            f'[[models]]\nrepo_id = "{models.TINY}"\n{more}\n'
        )

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "EDIF_TEST_SECRET": "must not reach a host"}
        with (self.folder / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "site_agent", "run", "--config", str(self.config)],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=self.folder,
            )

    async def ready(self, timeout_s: float = 60) -> dict[str, Any]:
        """Wait for the ready line."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), timeout_s)
        assert line, self.log()
        return json.loads(line)  # type: ignore[no-any-return]

    def kill(self) -> None:
        """kill -9."""
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals, timeout_s: float = 20) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(timeout_s)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return status

    def close(self) -> None:
        if self.process is not None:
            self.kill()

    def environment(self) -> dict[str, str]:
        """What the agent process was started with."""
        assert self.process is not None
        return psutil.Process(self.process.pid).environ()

    def logged(self, text: str, timeout_s: float = 30) -> None:
        """Wait until the agent's log holds `text`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def log(self) -> str:
        return (self.folder / "agent.log").read_text()


async def play(keys: Keys, server: NatsServer) -> PlayedCoordinator:
    """Return a coordinator that listens on `server`."""
    coordinator = PlayedCoordinator(keys, await connect(server.url, name="played"))
    await coordinator.listen()
    return coordinator


@dataclass
class Site:
    """A broker, a played coordinator, and a real agent that it has loaded the tiny model on."""

    server: NatsServer
    keys: Keys
    coordinator: PlayedCoordinator
    agent: AgentProcess


@asynccontextmanager
async def a_site(folder: Path, more: str = "", **settings: object) -> AsyncIterator[Site]:
    """Start all three under `folder` (which exists); `settings` are keys of the site's settings file, `more` its tables.

    Ends everything afterwards.
    """
    models.tiny_gpt2()
    # Serializing the first trace imports torch; afterwards no test blocks the loop for seconds.
    traces.one_read()
    server, keys = NatsServer(folder), Keys(folder)
    agent = AgentProcess(folder, keys, server, more, **settings)
    server.start()
    try:
        coordinator = await play(keys, server)
        agent.start()
        assert await agent.ready() == {"ready": True, "site": SITE}
        await coordinator.loaded()
        yield Site(server, keys, coordinator, agent)
        await coordinator.link.close()
    finally:
        agent.close()
        server.kill()
