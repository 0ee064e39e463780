"""A real agent process runs attempts for a played coordinator over a real broker."""

import asyncio
import hashlib
import resource
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch

from edif_mesh.domain.attempt import AttemptStatus, Blame
from edif_mesh.domain.ids import AttemptNumber
from edif_mesh.domain.job import Limits
from edif_mesh.results.archive import read
from edif_mesh.results.chunks import checked
from edif_mesh.results.forms import FormOpener
from edif_mesh.results.manifest import check_index, embedded_index
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import envelope_digest, open_envelope
from edif_mesh.wire.messages import LogLines, Manifest, Order, Received, Refusal, Report
from tests import traces
from tests.played_coordinator import SITE, PlayedCoordinator, Site, a_site, now_ms

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with a_site(tmp_path_factory.mktemp("site")) as site:
        yield site


async def archive_of(coordinator: PlayedCoordinator, order: Order, report: Report) -> tuple[Manifest, bytes]:
    """Fetch, check and join the stored result that `report` names."""
    assert report.manifest is not None
    opened = open_envelope(report.manifest, Manifest, coordinator.keys.trust, now_ms())
    assert opened.key == coordinator.keys.site.id
    manifest, chunks = opened.message, []
    for number in range(manifest.chunks):
        subject = subjects.result_chunk(order.job, report.attempt, number)
        stored = await coordinator.link.streams.get(subjects.RESULTS_STREAM, subject)
        assert stored is not None
        chunks.append(stored.data)
    index = embedded_index(manifest)
    if index is None:
        raw = await coordinator.link.streams.get(
            subjects.RESULTS_STREAM, subjects.result_chunk(order.job, report.attempt, "index")
        )
        assert raw is not None
        index = check_index(manifest, raw.data)
    assert [entry.digest for entry in index.entries] == [hashlib.sha256(chunk).digest() for chunk in chunks]
    opened_chunks = enumerate(zip(index.entries, chunks, strict=True))
    data = b"".join(
        checked(FormOpener(), manifest, number, entry, memoryview(chunk)) for number, (entry, chunk) in opened_chunks
    )
    assert len(data) == manifest.archive_bytes
    return manifest, data


async def test_a_granted_order_runs_and_its_result_is_stored_and_signed(site: Site) -> None:
    order = await site.coordinator.order(traces.one_read())
    envelope = site.coordinator.sign_order(order)
    assert isinstance(await site.coordinator.place(order, envelope), Received)
    report = await site.coordinator.ended(order)
    assert report.status is AttemptStatus.SUCCEEDED, report
    manifest, data = await archive_of(site.coordinator, order, report)
    assert (manifest.job, manifest.attempt, manifest.site) == (order.job, 1, SITE)
    assert manifest.order_digest == report.order_digest == envelope_digest(envelope)
    assert report.receipt is not None
    assert report.receipt.result_bytes == len(data) > 0


async def test_a_large_result_arrives_whole_in_chunks(site: Site) -> None:
    order = await site.coordinator.order(traces.large(20))
    await site.coordinator.place(order)
    report = await site.coordinator.ended(order)
    assert report.status is AttemptStatus.SUCCEEDED, report
    assert site.coordinator.reports_of(order)[0].status is AttemptStatus.RUNNING
    manifest, data = await archive_of(site.coordinator, order, report)
    assert manifest.chunks > 20
    assert torch.equal(read(data)["big"], torch.ones(20 << 18))


async def test_printed_lines_arrive_signed_and_in_order(site: Site) -> None:
    order = await site.coordinator.order(traces.printing())
    await site.coordinator.place(order)
    await site.coordinator.ended(order)
    lines: list[str] = []
    async with asyncio.timeout(10):
        subject = subjects.log_lines(order.job, AttemptNumber(1))
        async for stored in site.coordinator.link.streams.read(subjects.LOGS_STREAM, subject):
            message = open_envelope(stored.data, LogLines, site.keys.trust, now_ms()).message
            assert message.first == len(lines)
            lines += message.lines
            if len(lines) >= 3:
                break
    assert lines == ["one", "two", "three"]


async def test_code_that_raises_fails_with_its_own_traceback_and_the_users_blame(site: Site) -> None:
    order = await site.coordinator.order(traces.failing())
    await site.coordinator.place(order)
    report = await site.coordinator.ended(order)
    assert (report.status, report.blame) == (AttemptStatus.FAILED, Blame.USER)
    assert report.failure is not None
    assert report.failure.code == "user_error"
    assert "ZeroDivisionError" in report.failure.text


async def test_a_job_beyond_its_wall_time_is_stopped(site: Site) -> None:
    limits = Limits(wall_ms=500, memory_bytes=1 << 30, result_bytes=1 << 30)
    order = await site.coordinator.order(traces.endless(), limits=limits)
    await site.coordinator.place(order)
    report = await site.coordinator.ended(order)
    assert report.failure is not None
    assert (report.failure.code, report.blame) == ("wall_time", Blame.USER)


async def test_a_stop_ends_a_running_attempt_and_frees_its_slot(site: Site) -> None:
    order = await site.coordinator.order(traces.endless())
    await site.coordinator.place(order)
    await site.coordinator.running(order)
    assert isinstance(await site.coordinator.stop(order), Received)
    report = await site.coordinator.ended(order)
    assert (report.status, report.detail) == (AttemptStatus.CANCELLED, "cancelled")
    await site.coordinator.until(lambda: site.coordinator.adverts[-1].free_slots == 2)


async def test_a_stop_before_the_grant_bars_it(site: Site) -> None:
    order = await site.coordinator.order(traces.one_read())
    await site.coordinator.stop(order)
    assert (await site.coordinator.ended(order)).status is AttemptStatus.CANCELLED
    await site.coordinator.quiet()
    answer = await site.coordinator.place(order)
    assert not isinstance(answer, Received)
    assert answer.failure.code == "stopped"


async def test_an_attempt_that_an_answer_does_not_name_is_stopped_as_superseded(site: Site) -> None:
    order = await site.coordinator.order(traces.endless())
    await site.coordinator.place(order)
    await site.coordinator.running(order)
    site.coordinator.forgotten.add((order.job, 1))
    report = await site.coordinator.ended(order)
    assert (report.status, report.detail) == (AttemptStatus.CANCELLED, "superseded")


async def test_without_answers_the_site_stops_at_the_end_of_the_lease(site: Site) -> None:
    site.coordinator.renews = False
    try:
        order = await site.coordinator.order(traces.endless())
        await site.coordinator.place(order, lease_ms=700)
        report = await site.coordinator.ended(order)
    finally:
        site.coordinator.renews = True
    assert (report.status, report.blame) == (AttemptStatus.FAILED, Blame.SITE)
    assert report.failure is not None
    assert report.failure.code == "lease_ended"


async def test_a_report_is_repeated_until_it_is_acknowledged(site: Site) -> None:
    site.coordinator.acknowledges = False
    order = await site.coordinator.order(traces.failing())
    try:
        await site.coordinator.place(order)
        await site.coordinator.until(
            lambda: len([r for r in site.coordinator.reports_of(order) if r.status.terminal]) >= 2
        )
    finally:
        site.coordinator.acknowledges = True
    reports = [r for r in site.coordinator.reports_of(order) if r.status.terminal]
    assert len({report.sequence for report in reports}) == 1


async def test_an_acceptance_that_cannot_be_recorded_is_refused_and_leaves_nothing(site: Site) -> None:
    """The runner may have begun by then: nothing of it is heard, and the next grant runs."""
    order = await site.coordinator.order(traces.one_read())
    assert site.agent.process is not None
    pid = site.agent.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, before[1]))  # every write to a file fails
    try:
        answer = await site.coordinator.place(order)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    assert isinstance(answer, Refusal)
    assert "Nothing was started" in answer.failure.text or "nothing was started" in answer.failure.text
    await site.coordinator.quiet()
    assert site.coordinator.reports_of(order) == []
    assert site.coordinator.adverts[-1].free_slots == 2
    stored = await site.coordinator.link.streams.subjects(
        subjects.RESULTS_STREAM, subjects.result_chunks(order.job, AttemptNumber(1))
    )
    assert stored == {}
    assert isinstance(await site.coordinator.place(order, attempt=2), Received)
    assert (await site.coordinator.ended(order, 2)).status is AttemptStatus.SUCCEEDED


async def test_a_grant_that_is_repeated_while_it_runs_starts_nothing_more(site: Site) -> None:
    order = await site.coordinator.order(traces.endless())
    envelope = site.coordinator.sign_order(order)
    await site.coordinator.place(order, envelope)
    await site.coordinator.running(order)
    assert isinstance(await site.coordinator.place(order, envelope), Received)
    await site.coordinator.quiet()
    assert site.coordinator.adverts[-1].free_slots == 1
    await site.coordinator.stop(order)
    await site.coordinator.ended(order)
