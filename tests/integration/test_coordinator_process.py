"""The coordinator as a process, over a real broker: what it acknowledges is recorded, and survives `kill -9`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from edif_mesh.domain.attempt import AttemptStatus, Blame, Receipt
from edif_mesh.domain.ids import Digest, JobId
from edif_mesh.domain.job import Failure
from edif_mesh.domain.site import ModelRef
from edif_mesh.errors import EdifError, NoReplyError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.transport.nats_bus import Connection
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import seal
from edif_mesh.wire.messages import (
    AskJob,
    AskJobs,
    AskMesh,
    CancelJob,
    Grant,
    JobList,
    JobSnapshot,
    Manifest,
    MeshView,
    Refusal,
)
from tests.integration.coordinator_rig import ROOT, Researcher, Rig, Site, eventually, now_ms

pytestmark = pytest.mark.timeout(90)
JobsByStatus = dict[str, int]


@dataclass
class World:
    rig: Rig
    ada: Researcher
    sites: dict[str, Site]
    connection: Connection
    beats: list[asyncio.Task[None]]

    async def until_placed(self, site: str, count: int = 1) -> Grant:
        """The newest of at least `count` grants that arrived at `site`."""
        placed = self.sites[site].placed
        await eventually(lambda: len(placed) >= count, f"{count} grants at {site}")
        return placed[-1][0]

    def beat(self, *names: str) -> None:
        self.beats += [asyncio.create_task(self.sites[name].keep_advertising()) for name in names]


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    rig = Rig(tmp_path / "rig")
    rig.nats.start()
    await rig.start()
    connection = await rig.connect("test")
    sites = {name: Site(rig, connection, name) for name in rig.site_keys}
    for site in sites.values():
        await site.open()
    world = World(rig, Researcher(rig, connection), sites, connection, [])
    yield world
    for task in world.beats:
        task.cancel()
    await connection.close()
    await rig.close()


def a_manifest(site: Site, grant: Grant) -> str:
    manifest = Manifest(
        order_digest=grant.order_digest,
        job=grant.job,
        attempt=grant.attempt,
        site=site.name,
        archive_bytes=10,
        stored_bytes=10,
        chunks=1,
        root=Digest("1" * 64),
        issued_at_ms=now_ms(),
        receipt=Receipt(wall_ms=5),
    )
    return seal(manifest, site.key)


async def test_an_order_is_queued_placed_run_and_committed(world: World) -> None:
    order = await world.ada.submit()
    queued = await world.ada.until(order.job, "QUEUED")
    assert queued.text
    await world.sites["ansbach"].advertise()
    grant = await world.until_placed("ansbach")
    assert (grant.job, grant.attempt) == (order.job, 1)
    site = world.sites["ansbach"]
    await site.report(grant, AttemptStatus.RUNNING)
    await world.ada.until(order.job, "RUNNING")
    manifest = a_manifest(site, grant)
    answer = await site.report(grant, AttemptStatus.SUCCEEDED, manifest=manifest, receipt=Receipt(wall_ms=5))
    assert answer.result_committed
    done = await world.ada.until(order.job, "SUCCEEDED")
    assert done.manifest == manifest
    assert (await world.ada.job(order.job)).manifest == manifest
    listed = await world.ada.ask(AskJobs(now_ms()), JobList)
    assert [(job.job, job.status) for job in listed.jobs] == [(order.job, "SUCCEEDED")]


async def test_an_acknowledged_order_survives_kill_9_and_its_grant_is_sent_again(world: World) -> None:
    site = world.sites["ansbach"]
    site.answers = False
    await site.advertise()
    order = await world.ada.submit()
    first = await world.until_placed("ansbach")
    await world.rig.stop(signal.SIGKILL)
    before = len(site.placed)
    ready = await world.rig.start()
    assert ready["epoch"] == first.epoch + 1
    site.answers = True
    world.beat("ansbach")
    again = await world.until_placed("ansbach", before + 1)
    assert (again.job, again.attempt) == (order.job, 1)
    assert again.epoch >= first.epoch
    answer = await site.report(again, AttemptStatus.SUCCEEDED, manifest=a_manifest(site, again))
    assert answer.result_committed


async def test_an_order_older_than_any_site_ends_also_when_the_coordinator_died_before_it_was_judged(
    world: World,
) -> None:
    order = await world.ada.submit(model=ModelRef("nobody/has-this"))
    await world.ada.until(order.job, "QUEUED")
    await world.sites["ansbach"].advertise()
    await world.rig.stop(signal.SIGKILL)
    world.rig.write_config(policy="suspect_ms = 1000")
    await world.rig.start()
    world.beat("ansbach")
    failed = await world.ada.until(order.job, "FAILED")
    assert failed.failure is not None
    assert failed.failure.text.startswith("No site of this mesh offers the model nobody/has-this.")


async def test_a_result_reported_twice_and_across_a_crash_is_committed_once(world: World) -> None:
    site = world.sites["ansbach"]
    await site.advertise()
    order = await world.ada.submit()
    grant = await world.until_placed("ansbach")
    manifest = a_manifest(site, grant)
    assert (await site.report(grant, AttemptStatus.SUCCEEDED, manifest=manifest)).result_committed
    assert (await site.report(grant, AttemptStatus.SUCCEEDED, manifest=a_manifest(site, grant))).result_committed
    await world.rig.stop(signal.SIGKILL)
    await world.rig.start()
    assert (await site.report(grant, AttemptStatus.SUCCEEDED, manifest=manifest)).result_committed
    after = await world.ada.job(order.job)
    assert (after.status, after.manifest) == ("SUCCEEDED", manifest)


async def test_the_same_order_twice_is_one_job(world: World) -> None:
    order = world.ada.order()
    await world.ada.watch(order.job)
    envelope = seal(order, world.ada.key)
    await world.ada.send(envelope)
    await world.ada.send(envelope)
    other = world.ada.order()
    await world.ada.send(seal(other, world.ada.key))
    await world.ada.watch(other.job)
    await eventually(lambda: _knows(world.ada, other.job), "the later order")
    listed = await world.ada.ask(AskJobs(now_ms()), JobList)
    assert sorted(job.job for job in listed.jobs) == sorted([order.job, other.job])


async def test_a_failed_attempt_moves_to_the_other_site(world: World) -> None:
    await world.sites["ansbach"].advertise()
    order = await world.ada.submit()
    grant = await world.until_placed("ansbach")
    await world.sites["heilbronn"].advertise()
    failure = Failure("host_lost", "The model host died.")
    await world.sites["ansbach"].report(grant, AttemptStatus.FAILED, failure=failure, blame=Blame.SITE)
    second = await world.until_placed("heilbronn")
    assert (second.job, second.attempt) == (order.job, 2)


async def test_cancel_stops_the_attempt(world: World) -> None:
    site = world.sites["ansbach"]
    await site.advertise()
    order = await world.ada.submit()
    grant = await world.until_placed("ansbach")
    await world.ada.cancel(order.job)
    stop = await eventually(lambda: site.stopped, "a stop order")
    assert (stop[0].job, stop[0].attempt, stop[0].reason) == (order.job, 1, "cancelled")
    await site.report(grant, AttemptStatus.CANCELLED)
    assert (await world.ada.until(order.job, "CANCELLED")).job == order.job


async def test_orders_that_must_not_be_believed_are_refused_with_their_reason(world: World) -> None:
    stranger = PrivateKey.generate()
    ada = world.ada
    good = ada.order()
    expired = replace(ada.order(), issued_at_ms=1_000, not_before_ms=1_000, expires_at_ms=2_000)
    foreign = replace(ada.order(), federation="elsewhere")
    cases = {
        "unknown_key": seal(good, stranger),
        "wrong_role": seal(ada.order(), world.sites["ansbach"].key),
        "bad_signature": seal(ada.order(), ada.key).replace('"sig":"', '"sig":"AAAA')[:-8] + '"}]}',
        "expired": seal(expired, ada.key),
        "federation": seal(foreign, ada.key),
    }
    for job in (good.job, expired.job, foreign.job):
        await ada.watch(job)
    for envelope in cases.values():
        await ada.send(envelope)
    last = await ada.submit()
    await ada.until(last.job, "QUEUED")
    listed = await ada.ask(AskJobs(now_ms()), JobList)
    assert [job.job for job in listed.jobs if job.status == "QUEUED"] == [last.job]
    told = {refusal.job: refusal.failure.code for refusal in ada.refusals}
    assert told[good.job] == "unknown_key"
    assert {expired.job, foreign.job} <= set(told)


async def test_another_researcher_can_neither_see_nor_take_over_a_job(world: World) -> None:
    order = await world.ada.submit()
    await world.ada.until(order.job, "QUEUED")
    eve = PrivateKey.generate()
    world.rig.trust.enrol(replace(world.rig.trust.identities()[1], public_key=eve.public.hex(), name="eve@example.org"))
    other = Researcher(world.rig, world.connection, eve)

    async def refused() -> bool:
        return (await other.ask(AskJob(order.job, now_ms()), Refusal)).failure.code == "not_found"

    await eventually(refused, "the new key is known and the job hidden from it")
    assert (await other.ask(AskJobs(now_ms()), JobList)).jobs == ()
    assert (await other.ask(CancelJob(order.job, now_ms()), Refusal)).failure.code == "not_found"
    await other.send(seal(other.order(job=order.job), eve))
    later = await world.ada.submit()
    await world.ada.until(later.job, "QUEUED")
    assert world.ada.refusals == [], "the owner is not told that another's order was refused"
    assert (await world.ada.job(order.job)).status == "QUEUED"


async def test_poisonous_bytes_on_every_subject_stop_nothing(world: World) -> None:
    bus = world.connection.bus
    poison = [
        b"",
        b"\xff\xfe\x00" * 50,
        b"{",
        b"[" * 100_000,
        b'{"payload": 1, "payloadType": [], "signatures": {}}',
        b'{"a": 1, "a": 2}',
        b'"\\ud800"',
        json.dumps(
            {"payload": "AAAA", "payloadType": "x" * 1000, "signatures": [{"keyid": "k", "sig": "AA"}]}
        ).encode(),
        seal(world.ada.order(), world.ada.key).encode()[:-40],
        secrets.token_bytes(900_000),
    ]
    for data in poison:
        for subject in (subjects.advert(world.sites["ansbach"].name), subjects.report(world.sites["ansbach"].name)):
            await bus.publish(subject, data)
        await bus.publish(subjects.ask(), data)
        await world.connection.streams.append(
            subjects.order(world.ada.key.id), data or b" ", message_id=secrets.token_hex(8)
        )
    raw = await bus.request(subjects.ask(), b"{", timeout_ms=5_000)
    assert world.ada.open(raw, Refusal).message.failure.code == "wire"
    order = await world.ada.submit()
    await world.ada.until(order.job, "QUEUED")
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{world.rig.url}/metrics")).text
    assert 'edif_refused_total{code="wire"}' in text
    left = await world.connection.streams.subjects(subjects.ORDERS_STREAM, subjects.ALL_ORDERS)
    assert sum(left.values()) <= 1, "refused orders must not be delivered again"


async def test_a_site_may_speak_only_for_itself(world: World) -> None:
    ansbach, heilbronn = world.sites["ansbach"], world.sites["heilbronn"]
    forged = seal(heilbronn.an_advert(), ansbach.key)
    raw = await world.connection.bus.request(subjects.advert(heilbronn.name), forged.encode(), timeout_ms=3_000)
    assert world.ada.open(raw, Refusal).message.failure.code == "untrusted"
    mesh = await world.ada.ask(AskMesh(now_ms()), MeshView)
    assert [site for site in mesh.sites if site.seen_at_ms] == []


async def test_a_wiped_broker_loses_no_job(world: World) -> None:
    site = world.sites["ansbach"]
    await site.advertise()
    order = await world.ada.submit()
    grant = await world.until_placed("ansbach")
    world.rig.nats.kill()
    world.rig.nats.wipe()
    world.rig.nats.start()
    world.beat("ansbach")

    async def answered() -> bool:
        with contextlib.suppress(EdifError):
            return (
                await site.report(grant, AttemptStatus.SUCCEEDED, manifest=a_manifest(site, grant))
            ).result_committed
        return False

    await eventually(answered, "the report's answer", 30)
    assert (await world.ada.job(order.job)).status == "SUCCEEDED"

    async def accepted() -> JobSnapshot | None:
        with contextlib.suppress(EdifError):
            later = await world.ada.submit()
            return await world.ada.until(later.job, "PLACED", 5)
        return None

    await eventually(accepted, "a new order after the wipe", 40)


async def test_a_full_disk_is_a_sentence_and_no_order_is_lost(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "rig")
    rig.database.parent.mkdir()
    if not _mount_small(rig.database.parent):
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        rig.nats.start()
        await rig.start()
        connection = await rig.connect("test")
        ada, site = Researcher(rig, connection), Site(rig, connection, "ansbach")
        await site.open()
        first = await ada.submit()
        await ada.until(first.job, "QUEUED")
        junk = rig.database.parent / "junk"
        _fill(junk)
        second = await ada.submit(name="x" * 200)

        async def refused() -> bool:
            with contextlib.suppress(EdifError):
                return (await ada.ask(AskJob(second.job, now_ms()), Refusal)).failure.code == "record"
            return False

        await eventually(refused, "a sentence instead of an answer")
        assert (await site.advertise()).site == site.name, "leases go on while the disk is full"
        async with httpx.AsyncClient() as http:
            reasons = (await http.get(f"{rig.url}/readyz")).json()["reasons"]
        assert "cannot be written" in reasons[0]
        assert [update.job for update in ada.updates] == [first.job], "nothing unrecorded is told to anybody"
        assert site.placed == []
        junk.unlink()
        await eventually(lambda: len(site.placed) >= 2, "both orders placed once there is room")
        assert {grant.job for grant, _ in site.placed} == {first.job, second.job}
        await connection.close()
    finally:
        await rig.close()
        _unmount(rig.database.parent)


def _mount_small(folder: Path) -> bool:
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(junk: Path) -> None:
    with contextlib.suppress(OSError), junk.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)


async def test_a_second_coordinator_on_the_same_record_is_refused(world: World) -> None:
    command = (sys.executable, "-m", "coordinator", "run", "--config", str(world.rig.config))
    second = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(second.communicate(), 30)
    assert second.returncode == 2
    assert out == b""
    assert b"already leads with this database" in err
    assert b"Traceback" not in err


async def test_an_old_leader_that_lost_its_term_writes_no_more_and_ends(world: World) -> None:
    with sqlite3.connect(world.rig.database) as connection:
        connection.execute("UPDATE edif_term SET epoch = epoch + 1")
    connection.close()
    await world.connection.streams.append(
        subjects.order(world.ada.key.id), seal(world.ada.order(), world.ada.key).encode(), message_id="x"
    )
    assert world.rig.process is not None
    assert await asyncio.wait_for(world.rig.process.wait(), 15) == 1
    assert "writes no more" in world.rig.log()


async def test_sigterm_is_a_clean_end_and_nobody_answers_then(world: World) -> None:
    assert await world.rig.stop(signal.SIGTERM) == 0
    assert "Traceback" not in world.rig.log()
    with pytest.raises(NoReplyError):
        await world.ada.job(JobId("j" + "0" * 23))


async def test_http_says_ready_and_why_not(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.rig.url) as http:
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).json() == {"ready": True, "reasons": []}
        world.rig.nats.kill()

        async def told() -> bool:
            answer = await http.get("/readyz")
            return answer.status_code == 503 and "broker" in answer.json()["reasons"][0]

        await eventually(told, "not ready without a broker")
        assert (await http.get("/healthz")).status_code == 200


async def test_http_shows_jobs_and_sites_and_keeps_markup_out(world: World) -> None:
    await world.sites["ansbach"].advertise()
    order = await world.ada.submit(name="<script>alert(1)</script>")
    await world.until_placed("ansbach")
    async with httpx.AsyncClient(base_url=world.rig.url) as http:
        page = await http.get("/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "<script>alert" not in page.text
        shown = (await http.get("/api/v1/jobs")).json()
        assert [(job["job"], job["name"]) for job in shown] == [(order.job, order.name)]
        assert (await http.get(f"/api/v1/jobs/{order.job}")).json()["attempts"][0]["site"] == "ansbach"
        assert (await http.get(f"/api/v1/jobs/{order.job}/why")).status_code == 200
        assert (await http.get("/api/v1/jobs/nonsense")).status_code == 404
        mesh = (await http.get("/api/v1/mesh")).json()
        assert "ansbach" in [site["site"] for site in mesh["sites"]]
        events = (await http.get("/api/v1/events", params={"job": order.job})).json()
        assert events
        async with http.stream("GET", "/api/v1/stream") as stream:
            lines = stream.aiter_lines()
            assert await asyncio.wait_for(anext(lines), 10) == "event: view"
            frame = json.loads((await asyncio.wait_for(anext(lines), 10)).removeprefix("data: "))
        assert frame["jobs"][0]["name"] == order.name
        metrics = (await http.get("/metrics")).text
        assert "edif_epoch 1.0" in metrics
        assert 'edif_sites{status="ACTIVE"} 1.0' in metrics


async def test_check_says_what_is_wrong_in_one_sentence(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "rig")
    good = await _check(rig)
    assert good[0] == 0
    assert "The settings are good" in good[1]
    rig.write_config(extra="no_such_key = 1")
    status, text = await _check(rig)
    assert status == 2
    assert "no_such_key" in text
    rig.write_config()
    rig.trust.revoke(rig.key.id, now_ms())
    (rig.folder / "coordinator.pem").unlink()
    status, text = await _check(rig)
    assert (status, "coordinator.pem cannot be read" in text) == (2, True)


async def _check(rig: Rig) -> tuple[int, str]:
    command = (sys.executable, "-m", "coordinator", "check", "--config", str(rig.config))
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert b"Traceback" not in out
    return process.returncode or 0, out.decode()


async def _knows(ada: Researcher, job: JobId) -> bool:
    with contextlib.suppress(EdifError):
        return (await ada.job(job)).job == job
    return False
