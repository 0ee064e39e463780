"""The Python client against a coordinator that misbehaves, forgets, repeats and dies, on a real broker."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edif_mesh.client.mesh import JobSpec, Mesh
from edif_mesh.domain.ids import Epoch, JobId, job_id
from edif_mesh.domain.job import Failure, JobStatus
from edif_mesh.domain.site import ModelRef
from edif_mesh.errors import (
    JobCancelledError,
    JobFailedError,
    ManifestError,
    NotFoundError,
    RefusedError,
    UserCodeError,
    WireError,
)
from edif_mesh.wire.messages import Refusal
from tests.scripted_coordinator import ScriptedCoordinator, scripted, watched

SPEC = JobSpec(ModelRef("m"))


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[ScriptedCoordinator]:
    async with scripted(tmp_path) as coordinator:
        yield coordinator


@pytest.fixture
async def mesh(hub: ScriptedCoordinator) -> AsyncIterator[Mesh]:
    async with await Mesh.connect(hub.config()) as mesh:
        yield mesh


# ---------------------------------------------------------------------------------------------------------------- watch


async def test_every_state_is_seen_once_and_in_order(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    job = await mesh.submit(b"payload", SPEC)
    await hub.until(lambda: hub.orders)
    for version, status in ((3, JobStatus.RUNNING), (2, JobStatus.PLACED), (3, JobStatus.RUNNING)):
        await hub.tell(hub.snapshot(job.id, version, status), job.id)
    await hub.tell(hub.snapshot(job.id, 4, JobStatus.SUCCEEDED), job.id)
    assert [s.version for s in await watched(job)] == [1, 3, 4]
    assert not mesh.outbox.waits(job.id)


async def test_a_new_leader_with_an_older_record_is_believed(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    job = await mesh.submit(b"payload", SPEC)
    await hub.until(lambda: hub.orders)
    await hub.tell(hub.snapshot(job.id, 9, JobStatus.RUNNING), job.id)
    restored = replace(hub.snapshot(job.id, 5, JobStatus.CANCELLED), epoch=Epoch(2))
    await hub.tell(restored, job.id)
    assert [s.version for s in await watched(job)] == [1, 9, 5]


async def test_what_was_missed_is_asked_for(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    job = await mesh.submit(b"payload", SPEC)
    await hub.until(lambda: hub.orders)
    hub.snapshots[job.id] = hub.snapshot(job.id, 7, JobStatus.SUCCEEDED)  # and never published
    assert [s.version for s in await watched(job)][-1] == 7


async def test_a_job_that_has_ended_is_known_at_once_from_another_process(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    job = job_id(1, 1)
    hub.snapshots[job] = hub.snapshot(job, 7, JobStatus.SUCCEEDED)
    async with asyncio.timeout(1):
        assert len(await watched(mesh.job(job))) == 1


async def test_two_may_watch_one_job(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    job = await mesh.submit(b"payload", SPEC)
    watching = [asyncio.create_task(watched(job)) for _ in range(2)]
    await hub.until(lambda: hub.orders and hub.asked)  # the second asks when it begins
    await hub.tell(hub.snapshot(job.id, 2, JobStatus.RUNNING), job.id)
    await hub.tell(hub.snapshot(job.id, 3, JobStatus.SUCCEEDED), job.id)
    assert [[s.version for s in await task][-1] for task in watching] == [3, 3]
    assert hub.asked == 1


async def test_a_watch_goes_on_when_the_broker_was_killed(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    job = await mesh.submit(b"payload", SPEC)
    await hub.until(lambda: hub.orders)
    watching = asyncio.create_task(watched(job))
    hub.server.kill()
    hub.snapshots[job.id] = hub.snapshot(job.id, 2, JobStatus.SUCCEEDED)
    hub.server.start()
    assert [s.version for s in await watching][-1] == 2


async def test_an_order_demands_the_sandbox_of_its_job_or_else_of_the_settings(hub: ScriptedCoordinator) -> None:
    async with await Mesh.connect(replace(hub.config(), sandbox="namespaced")) as mesh:
        for spec in (SPEC, replace(SPEC, sandbox="strict")):
            await mesh.submit(b"payload", spec)
    await hub.until(lambda: len(hub.orders) == 2)
    assert {order.sandbox for order, _ in hub.orders} == {"namespaced", "strict"}


# ----------------------------------------------------------------------------------------------------- who is believed


async def test_the_coordinator_may_refuse_and_a_site_may_not(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    hub.records = False
    job = await mesh.submit(b"payload", SPEC)
    await hub.until(lambda: hub.orders)
    watching = asyncio.create_task(watched(job))
    await hub.tell(Refusal(Failure("quota", "a lie"), job.id), job.id, key=hub.site)
    await hub.tell(Refusal(Failure("quota", "You have no quota left."), job.id), job.id)
    with pytest.raises(RefusedError, match="You have no quota left") as refused:
        await watching
    assert refused.value.code == "quota"
    assert mesh.outbox.order(job.id) is None


async def test_a_state_signed_by_a_site_is_ignored(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    job = await mesh.submit(b"payload", SPEC)
    await hub.until(lambda: hub.orders)
    await hub.tell(hub.snapshot(job.id, 50, JobStatus.FAILED), job.id, key=hub.site)
    await hub.tell(hub.snapshot(job.id, 2, JobStatus.SUCCEEDED), job.id)
    assert [s.version for s in await watched(job)] == [1, 2]


async def test_an_answer_about_another_job_is_not_accepted(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    mine, other = job_id(1, 1), job_id(1, 2)
    hub.snapshots[mine] = hub.snapshot(other, 1, JobStatus.SUCCEEDED)
    with pytest.raises(WireError, match="not accepted"):
        await mesh.job(mine).status()


async def test_a_success_without_a_manifest_is_no_result(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    job = await mesh.submit(b"payload", SPEC)
    await hub.until(lambda: hub.orders)
    await hub.tell(hub.snapshot(job.id, 2, JobStatus.SUCCEEDED), job.id)
    with pytest.raises(ManifestError, match="gave no manifest"):
        await job.result()


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (JobStatus.FAILED, "user_error", UserCodeError),
        (JobStatus.FAILED, "out_of_memory", JobFailedError),
        (JobStatus.CANCELLED, "cancelled", JobCancelledError),
        (JobStatus.QUARANTINED, "quarantined", JobFailedError),
    ],
)
async def test_how_it_ended_is_the_error(
    hub: ScriptedCoordinator, mesh: Mesh, status: JobStatus, code: str, error: type[Exception]
) -> None:
    job = await mesh.submit(b"payload", SPEC)
    await hub.until(lambda: hub.orders)
    await hub.tell(hub.snapshot(job.id, 2, status, failure=Failure(code, "why it ended")), job.id)
    with pytest.raises(error, match="why it ended"):
        await job.result()


# --------------------------------------------------------------------------------------------------------------- outbox


async def test_an_order_is_sent_again_until_it_is_recorded(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    hub.records = False
    job = await mesh.submit(b"payload", SPEC)
    await hub.until(lambda: hub.orders)
    watching = asyncio.create_task(watched(job))
    await hub.until(lambda: len(hub.orders) == 2)
    assert hub.orders[0] == hub.orders[1]
    await hub.tell(hub.snapshot(job.id, 2, JobStatus.SUCCEEDED), job.id)
    await watching


async def test_the_status_of_an_order_that_has_just_left_is_waited_for(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    hub.records = False
    job = await mesh.submit(b"payload", SPEC)
    asking = asyncio.create_task(job.status(patience_s=20))
    await hub.until(lambda: hub.asked >= 2)
    hub.snapshots[job.id] = hub.snapshot(job.id, 1, JobStatus.QUEUED)
    assert (await asking).status is JobStatus.QUEUED


async def test_what_a_crash_left_is_sent_by_the_next_process(hub: ScriptedCoordinator) -> None:
    async with await Mesh.connect(hub.config()) as first:
        job = await first.prepare(b"payload", SPEC)  # and it dies before `send`
    async with await Mesh.connect(hub.config()) as second:
        assert await second.flush_outbox() == [job.id]
        await hub.until(lambda: hub.orders)
        assert hub.orders[0][0].job == job.id
        await _until(lambda: not second.outbox.waits(job.id))
        assert second.outbox.order(job.id) is not None


async def test_a_job_that_nobody_knows_is_a_sentence(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    with pytest.raises(NotFoundError, match="There is no job"):
        await watched(mesh.job(job_id(1, 1)))
    with pytest.raises(NotFoundError, match="is no job id"):
        mesh.job("../../etc/passwd")


# ---------------------------------------------------------------------------------------------------------------- lines


async def test_lines_come_in_order_and_once(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    lines: list[str] = []
    job = await mesh.prepare(b"payload", SPEC, on_line=lines.append)
    await hub.print(job.id, 0, "a", "b")
    await hub.print(job.id, 0, "a", "b")
    await hub.print(job.id, 2, "c", key=hub.researcher)
    await hub.print(job.id, 2, "C")
    await _until(lambda: len(lines) == 3)
    assert lines == ["a", "b", "C"]


async def test_lines_that_a_lost_link_held_back_come_before_the_later_ones(
    hub: ScriptedCoordinator, mesh: Mesh
) -> None:
    job = await mesh.prepare(b"payload", SPEC)
    await hub.print(job.id, 0, "before", "we", "listened")
    lines: list[str] = []
    follower = await job.listen(lines.append)
    hub.snapshots[job.id] = hub.snapshot(job.id, 1, JobStatus.RUNNING)
    await job.status()  # an answer means that the broker has our subscription too
    await hub.print(job.id, 3, "now")
    await _until(lambda: len(lines) == 4)
    await hub.print(job.id, 4, "last")
    await follower.finish()
    assert lines == ["before", "we", "listened", "now", "last"]


async def test_the_last_lines_are_given_after_a_cut(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    lines: list[str] = []
    job = await mesh.prepare(b"payload", SPEC, on_line=lines.append)
    assert job.printing is not None
    await job.printing.close()  # as a cut: nothing is heard
    mesh.link_losses += 1
    await hub.print(job.id, 0, "said meanwhile")
    await job.printing.finish()
    await job.printing.finish()
    assert lines == ["said meanwhile"]


@pytest.mark.parametrize("follow", [False, True])
async def test_logs_give_what_was_printed_and_end(hub: ScriptedCoordinator, mesh: Mesh, follow: bool) -> None:
    job = await mesh.submit(b"payload", SPEC)
    await hub.until(lambda: hub.orders)
    await hub.print(job.id, 0, "a")
    await hub.print(job.id, 1, "b")
    hub.snapshots[job.id] = hub.snapshot(job.id, 2, JobStatus.SUCCEEDED)
    async with asyncio.timeout(10):
        assert [line async for line in mesh.job(job.id).logs(follow=follow)] == ["a", "b"]
        assert [line async for line in mesh.job(job_id(1, 1)).logs()] == []


async def test_a_closed_job_leaves_nothing_subscribed(hub: ScriptedCoordinator, mesh: Mesh) -> None:
    job = await mesh.submit(b"payload", SPEC)
    await hub.until(lambda: hub.orders)
    await job.listen(lambda _: None)
    assert await _listeners(hub, job.id) > 0
    await job.close()
    hub.snapshots[job.id] = hub.snapshot(job.id, 1, JobStatus.RUNNING)
    async with asyncio.timeout(10):
        while await _listeners(hub, job.id):
            await job.status()  # results have a connection of their own: its unsubscription may come a little later


async def _listeners(hub: ScriptedCoordinator, job: JobId) -> int:
    """How many subscriptions of all connections name the job, as the broker itself sees it."""
    assert hub.server.extra
    port = hub.server.extra.split(":")[1].strip()
    text = await asyncio.to_thread(
        lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/subsz?subs=1&limit=10000", timeout=5).read()
    )
    return sum(job in entry["subject"] for entry in json.loads(text)["subscriptions_list"])


async def _until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not what():  # noqa: ASYNC110 (a file, or a list that a callback fills)
            await asyncio.sleep(0.01)
