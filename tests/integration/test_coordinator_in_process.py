"""The coordinator's service inside the test: what needs a look at its memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from coordinator.monitoring import stream
from coordinator.shell import loop as shell_loop
from coordinator.shell.service import Service
from edif_mesh.config import CoordinatorConfig, load_config
from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.ids import JobId
from edif_mesh.wire.envelope import seal
from edif_mesh.wire.messages import AskJob, Refusal
from tests.integration.coordinator_rig import Researcher, Rig, Site, eventually, now_ms
from tests.integration.test_coordinator_process import a_manifest

pytestmark = pytest.mark.timeout(60)


class Inside:
    """A service, a researcher and one site that has room."""

    def __init__(self, rig: Rig, service: Service, ada: Researcher, site: Site) -> None:
        self.rig, self.service, self.ada, self.site = rig, service, ada, site

    async def run_one(self) -> tuple[JobId, str]:
        """Run a job to its end; return its id and its order's envelope."""
        order = self.ada.order()
        envelope = seal(order, self.ada.key)
        await self.ada.watch(order.job)
        await self.ada.send(envelope)
        grant = await asyncio.wait_for(self.site.placement.get(), 10)
        await self.site.report(grant, AttemptStatus.SUCCEEDED, manifest=a_manifest(self.site, grant))
        return order.job, envelope


@pytest_asyncio.fixture
async def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Inside]:
    monkeypatch.setattr(shell_loop, "ENDED_IN_MEMORY", 2)
    rig = Rig(tmp_path / "rig", sites=("ansbach",))
    rig.nats.start()
    mine, theirs = await rig.connect("coordinator"), await rig.connect("test")
    config = load_config(CoordinatorConfig, rig.config)
    service = Service(config, rig.key, rig.trust, mine.bus, mine.streams)
    await service.start()
    site = Site(rig, theirs, "ansbach")
    await site.open()
    await site.advertise()
    yield Inside(rig, service, Researcher(rig, theirs), site)
    await service.close()
    await mine.close()
    await theirs.close()
    await rig.close()


async def test_an_ended_job_that_left_memory_is_still_known_and_never_run_again(inside: Inside) -> None:
    ended = [await inside.run_one() for _ in range(5)]
    state = inside.service._loop.state
    await eventually(lambda: len(state.jobs) == 2, "only the newest ended jobs stay in memory")
    job, envelope = ended[0]
    assert job not in state.jobs

    placed, told = len(inside.site.placed), len(inside.ada.updates)
    await inside.ada.send(envelope)
    again = await eventually(lambda: inside.ada.updates[told:], "the old job's snapshot instead of a second run")
    assert (again[0].job, again[0].status) == (job, "SUCCEEDED")
    assert len(inside.site.placed) == placed
    snapshot = await inside.ada.job(ended[1][0])
    assert snapshot.status == "SUCCEEDED"
    assert snapshot.manifest is not None
    async with httpx.AsyncClient(base_url=inside.service.url) as http:
        shown = (await http.get("/api/v1/jobs")).json()
        assert [item["job"] for item in shown] == [name for name, _ in reversed(ended)]
        assert (await http.get(f"/api/v1/jobs/{ended[2][0]}")).json()["status"] == "SUCCEEDED"


async def test_a_late_report_of_a_job_that_left_memory_is_answered_as_committed(inside: Inside) -> None:
    await inside.run_one()
    grant = inside.site.placed[0][0]
    for _ in range(3):
        await inside.run_one()
    assert grant.job not in inside.service._loop.state.jobs
    answer = await inside.site.report(grant, AttemptStatus.SUCCEEDED, manifest=a_manifest(inside.site, grant))
    assert answer.result_committed


async def test_a_rule_that_breaks_costs_one_message_and_not_the_loop(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = shell_loop.decide, []

    def fragile(event: object, *rest: object) -> object:
        if type(event).__name__ == "JobAsked":
            broken.append(event)
            raise RuntimeError("planted")
        return real(event, *rest)  # type: ignore[arg-type]

    job, _ = await inside.run_one()
    monkeypatch.setattr(shell_loop, "decide", fragile)
    refusal = await inside.ada.ask(AskJob(job, now_ms()), Refusal)
    assert refusal.failure.code == "internal"
    assert broken
    await inside.run_one()


async def test_a_reader_that_takes_nothing_is_cut_off_and_slows_nobody(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "STALL_S", 0.5)
    monkeypatch.setattr(stream, "LOOK_S", 0.0)
    monkeypatch.setattr(stream, "REFRESH_S", 0.0)
    port = int(inside.service.url.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(b"GET /api/v1/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    await writer.drain()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    hub = inside.service._monitoring.hub
    await eventually(lambda: hub._readers == 1, "the reader is served")
    began = time.monotonic()
    await inside.run_one()
    assert time.monotonic() - began < 10
    await eventually(lambda: hub._readers == 0, "the stalled reader is cut off", 30)
    writer.close()


async def test_only_so_many_readers_are_served(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_READERS", 1)
    async with (
        httpx.AsyncClient(base_url=inside.service.url) as http,
        http.stream("GET", "/api/v1/stream") as first,
    ):
        await anext(first.aiter_lines())
        assert (await http.get("/api/v1/stream")).status_code == 503
    assert (await http_get(inside.service.url, "evil.example")).status_code == 421


async def http_get(url: str, host: str) -> httpx.Response:
    async with httpx.AsyncClient() as http:
        return await http.get(url, headers={"Host": host})
