"""Whose turn it is, where a job may go, what ends it, and what its owner is told."""

from __future__ import annotations

import pytest

from coordinator.core import events as ev
from coordinator.core.decision import SendStop
from edif_mesh.domain.attempt import AttemptStatus, Blame
from edif_mesh.domain.ids import Epoch, JobId, SiteId
from edif_mesh.domain.job import Failure, JobClass, JobStatus, Limits
from edif_mesh.domain.site import ModelRef, ModelState, SiteStatus, Versions
from edif_mesh.wire.messages import Audience, Refusal
from tests.builders import ALICE, BOB, T0, Desk, an_offer, grants, refusals, replies, stops

A, B, C = "ansbach", "bamberg", "coburg"


def a_queue(slots: int = 1) -> tuple[Desk, JobId]:
    """Return a desk whose only site is filled by one job of its own."""
    desk = Desk()
    desk.advert(A, slots=slots)
    first = desk.orders(999)
    desk.accepts(first)
    return desk, first


def order_of_service(desk: Desk, first: JobId, count: int) -> list[JobId]:
    """Let `count` jobs run one after the other; return them in their order."""
    served, current = [], first
    for _ in range(count):
        desk.now_ms += 1000
        desk.reports(current, AttemptStatus.SUCCEEDED)
        (current,) = [j.job for j in desk.state.jobs.values() if j.status is JobStatus.PLACED]
        desk.accepts(current)
        served.append(current)
    return served


def test_one_owners_jobs_run_in_the_order_of_their_arrival() -> None:
    desk, first = a_queue()
    jobs = []
    for number in (5, 3, 9, 1):
        desk.now_ms += 1
        jobs.append(desk.orders(number))
    assert [desk.sees(job).position for job in jobs] == [1, 2, 3, 4]
    assert order_of_service(desk, first, 4) == jobs


def test_a_sweep_does_not_starve_another_owners_job() -> None:
    desk, first = a_queue()
    for number in range(1, 200):
        desk.now_ms += 1
        desk.orders(number)
    order_of_service(desk, first, 20)
    light = desk.orders(500, owner=BOB)
    assert (desk.sees(light, by=BOB).position or 99) <= 2
    (running,) = [j.job for j in desk.state.jobs.values() if j.status is JobStatus.PLACED]
    assert light in order_of_service(desk, running, 2)


def test_owners_take_turns() -> None:
    desk, first = a_queue()
    hers = [desk.orders(number, owner=ALICE) for number in range(10, 14)]
    his = [desk.orders(number, owner=BOB) for number in range(20, 24)]
    served = order_of_service(desk, first, 6)
    assert 2 <= sum(job in hers for job in served) <= 4
    assert all(job in hers + his for job in served)


def test_interactive_jobs_go_before_batch_jobs() -> None:
    desk, first = a_queue()
    batch = desk.orders(1, job_class=JobClass.BATCH)
    desk.now_ms += 1
    interactive = desk.orders(2)
    assert (desk.sees(interactive).position, desk.sees(batch).position) == (1, 2)
    assert order_of_service(desk, first, 2) == [interactive, batch]


def test_a_job_that_must_wait_for_its_site_blocks_no_other() -> None:
    desk, _ = a_queue(slots=1)
    desk.orders(1, audience=Audience(sites=(SiteId(A),)))
    desk.now_ms += 1
    free = desk.orders(2)
    assert grants(desk.advert(B)) == [(B, 1)]
    assert desk.attempt(free).site == B


def test_grants_never_exceed_slots_or_memory_that_a_site_advertises() -> None:
    desk = Desk()
    desk.advert(A, slots=3, memory_bytes=5 << 30)
    jobs = [desk.orders(number) for number in range(1, 5)]
    assert [desk.job(job).status for job in jobs] == [JobStatus.PLACED] * 2 + [JobStatus.QUEUED] * 2
    reasons = [reason.code for verdict in desk.sees(jobs[2], explain=True).why for reason in verdict.reasons]
    assert reasons == ["no_memory"]


def test_a_loaded_model_goes_before_one_that_has_to_be_loaded() -> None:
    desk = Desk()
    desk.advert(A, models=(an_offer(state=ModelState.LOADABLE, load_ms=20_000),))
    desk.advert(B)
    assert desk.attempt(desk.orders()).site == B


def test_an_order_never_runs_below_the_sandbox_that_it_demands() -> None:
    desk = Desk()
    desk.advert(A, sandbox="base")
    desk.advert(B, sandbox="namespaced", slots=1)
    first, second = (desk.orders(number, sandbox="namespaced") for number in (1, 2))
    assert desk.attempt(first).site == B
    assert desk.job(second).status is JobStatus.QUEUED
    codes = {v.site: [r.code for r in v.reasons] for v in desk.sees(second, explain=True).why}
    assert codes == {A: ["sandbox"], B: ["no_slot"]}
    assert desk.attempt(desk.orders(3)).site == A


@pytest.mark.parametrize(
    ("advert", "order", "code"),
    [
        ({}, {"audience": Audience(sites=(SiteId(B),))}, "audience"),
        ({}, {"audience": Audience(countries=("FR",))}, "audience"),
        ({}, {"model": ModelRef("gpt2", revision="other")}, "revision"),
        ({}, {"model": ModelRef("gpt2", dtype="bfloat16")}, "dtype"),
        ({}, {"model": ModelRef("nobody/has-it")}, "unknown_model"),
        ({}, {"client": Versions(nnsight="0.5.0")}, "versions"),
        ({}, {"client": Versions(nnsight="0.9.0")}, "versions"),
        ({"limits": Limits(wall_ms=1000)}, {}, "limits"),
        ({"memory_bytes": 1 << 30}, {}, "too_large"),
        ({"sandbox": ""}, {}, "sandbox"),
        ({"sandbox": "base"}, {"sandbox": "namespaced"}, "sandbox"),
        ({"sandbox": "strict"}, {"sandbox": "stricter"}, "sandbox"),
        ({}, {"expires_at_ms": T0 + 1}, "expired"),
        ({}, {"issued_at_ms": T0 + 10**9, "expires_at_ms": T0 + 10**9 + 1}, "window"),
        ({}, {"federation": "another"}, "federation"),
        ({}, {"limits": Limits(memory_bytes=-1)}, "limits"),
        ({}, {"max_attempts": 0}, "attempts"),
    ],
)
def test_an_order_that_can_never_run_is_refused_with_its_reason(
    advert: dict[str, object], order: dict[str, object], code: str
) -> None:
    desk = Desk()
    desk.advert(A, **advert)
    desk.orders(**order)  # type: ignore[arg-type]
    (refusal,) = refusals(desk.sent)
    assert refusal.failure.code == code
    assert refusal.failure.text.endswith((".", "'"))
    assert desk.state.jobs == {}


def test_an_order_that_only_a_silent_site_could_take_waits_and_says_for_what() -> None:
    desk = Desk()
    desk.advert(A)
    desk.advert(B, models=(an_offer("other"),))
    desk.passes(20_000, B)
    job = desk.orders()
    text = desk.sees(job).text
    assert text == f"Queued, position 1; waiting: {A} has not been heard of for a while."
    assert grants(desk.advert(A)) == [(A, 1)]


def test_the_same_order_twice_is_one_job_and_another_one_under_its_id_is_refused() -> None:
    desk = Desk()
    desk.advert(A)
    job = desk.orders()
    before = desk.job(job)
    desk.orders()
    assert desk.job(job) == before
    desk.orders(digest="e" * 64)
    assert [r.failure.code for r in refusals(desk.sent)] == ["duplicate_job"]
    assert desk.job(job) == before


def test_only_the_owner_sees_and_cancels_a_job() -> None:
    desk, job = a_queue()
    for event in (ev.CancelRequested(job, BOB, "mine", "ask"), ev.JobAsked(job, BOB, False, "ask")):
        (reply,) = replies(desk.happens(event))
        assert isinstance(reply, Refusal)
    assert desk.job(job).status is JobStatus.PLACED


def test_cancelling_a_running_job_stops_it_until_the_site_confirms_and_then_frees_its_slot() -> None:
    desk, job = a_queue()
    waiting = desk.orders(1)
    assert stops(desk.happens(ev.CancelRequested(job, ALICE, "enough", "ask"))) == [(A, "cancelled")]
    assert desk.job(waiting).status is JobStatus.QUEUED, "the runner may still hold its slot"
    desk.sent.clear()
    desk.passes(3000)
    assert len([item for item in desk.sent if isinstance(item, SendStop)]) == 3
    assert grants(desk.reports(job, AttemptStatus.CANCELLED)) == [(A, 1)]
    before = desk.job(job)
    desk.happens(ev.CancelRequested(job, ALICE, "again", "ask"))
    assert desk.job(job) == before
    assert before.status is JobStatus.CANCELLED


def test_cancelling_a_queued_job_takes_it_out_of_the_queue_and_bothers_no_site() -> None:
    desk, running = a_queue()
    waiting = desk.orders(1)
    assert stops(desk.happens(ev.CancelRequested(waiting, ALICE, "enough", "ask"))) == []
    assert desk.job(waiting).status is JobStatus.CANCELLED
    desk.fails(running, Blame.USER)
    desk.passes(3000, A)
    assert (desk.job(waiting).status, desk.job(waiting).attempt) == (JobStatus.CANCELLED, 0)


def test_an_orders_time_ends_it_whether_queued_or_placed() -> None:
    desk, _ = a_queue(slots=2)
    until = desk.now_ms + 10_000
    placed, queued = desk.orders(1, expires_at_ms=until), desk.orders(2, expires_at_ms=until)
    later = desk.orders(3, expires_at_ms=until + 60_000)
    desk.passes(9_000, A)
    assert (desk.job(placed).status, desk.job(queued).status) == (JobStatus.PLACED, JobStatus.QUEUED)
    desk.sent.clear()
    desk.passes(1_000, A)
    assert [desk.job(job).status for job in (placed, queued)] == [JobStatus.EXPIRED] * 2
    assert not desk.job(later).terminal
    assert [(item.stop.site, item.stop.reason) for item in desk.sent if isinstance(item, SendStop)] == [(A, "expired")]


def test_a_users_error_ends_the_job_and_is_tried_nowhere_else() -> None:
    desk, job = a_queue()
    desk.advert(B)
    desk.fails(job, Blame.USER, "Traceback\n  ...\nIndexError: layer 99")
    record = desk.job(job)
    assert (record.status, record.attempt) == (JobStatus.FAILED, 1)
    assert record.failure is not None
    assert "IndexError: layer 99" in record.failure.text


def test_two_crashes_at_two_sites_quarantine_a_job() -> None:
    desk, job = a_queue()
    desk.advert(B)
    desk.advert(C)
    desk.fails(job, Blame.RUNNER)
    desk.passes(5000, A, B, C)
    assert desk.attempt(job).site != A
    desk.accepts(job)
    desk.fails(job, Blame.RUNNER)
    assert desk.job(job).status is JobStatus.QUARANTINED
    assert desk.job(job).crashes == 2


def test_a_job_waits_a_while_for_a_busy_site_rather_than_return_to_where_it_failed() -> None:
    desk, job = a_queue()
    other = desk.orders(1)
    desk.advert(B, slots=1)
    assert desk.attempt(other).site == B
    desk.accepts(other)
    desk.fails(job, Blame.RUNNER)
    desk.passes(30_000, A, B)
    assert desk.job(job).status is JobStatus.QUEUED
    desk.passes(60_000, A, B)
    assert desk.attempt(job).site == A, "but not for ever"


def test_losses_use_up_a_job_and_no_attempt_goes_beyond_the_orders_maximum() -> None:
    desk = Desk()
    for site in (A, B, C):
        desk.advert(site)
    job = desk.orders(max_attempts=2)
    for _ in range(2):
        desk.accepts(job)
        desk.fails(job, Blame.SITE)
        desk.passes(10_000, A, B, C)
    assert (desk.job(job).status, desk.job(job).attempt) == (JobStatus.FAILED, 2)
    assert "all 2 attempts" in desk.job(job).text


def test_a_released_attempt_is_no_loss() -> None:
    desk, job = a_queue()
    desk.advert(B)
    desk.reports(job, AttemptStatus.RELEASED, detail="draining")
    desk.passes(5000, A, B)
    assert (desk.job(job).losses, desk.attempt(job).site) == (0, B)


@pytest.mark.parametrize("status", [SiteStatus.CORDONED, SiteStatus.DRAINING])
def test_a_cordoned_site_gets_no_new_attempts(status: SiteStatus) -> None:
    desk = Desk()
    desk.advert(A, status=status)
    job = desk.orders()
    assert desk.job(job).status is JobStatus.QUEUED
    assert grants(desk.advert(A, status=SiteStatus.ACTIVE)) == [(A, 1)]


def test_a_declined_job_goes_elsewhere_and_the_reason_stays_with_its_attempt() -> None:
    desk, job = a_queue()
    desk.advert(B)
    desk.reports(job, AttemptStatus.DECLINED, failure=Failure("policy", "Not here."))
    desk.passes(5000, A, B)
    view = desk.sees(job).attempts[0]
    assert (view.status, view.failure) == (AttemptStatus.DECLINED, Failure("policy", "Not here."))
    assert desk.attempt(job).site == B


def test_a_term_starts_with_grants_of_its_own_epoch() -> None:
    desk, _ = a_queue()
    job = desk.orders(1)
    desk.happens(ev.TermStarted(Epoch(7)))
    desk.advert(B)
    assert desk.attempt(job).epoch == 7


def test_several_slots_that_come_free_together_are_shared_between_owners() -> None:
    desk = Desk()
    desk.advert(A, slots=0)
    for number in range(1, 9):
        desk.now_ms += 1
        desk.orders(number, owner=ALICE)
    for number in range(11, 19):
        desk.now_ms += 1
        desk.orders(number, owner=BOB)
    desk.advert(A, slots=4)
    placed = [job.owner for job in desk.state.jobs.values() if job.status is JobStatus.PLACED]
    assert (placed.count(ALICE), placed.count(BOB)) == (2, 2)


def test_a_newcomer_brings_no_claim_from_the_time_before_it_came() -> None:
    desk, current = a_queue()
    for number in range(1, 60):
        desk.now_ms += 1
        desk.orders(number)
    current = order_of_service(desk, current, 20)[-1]
    for number in range(100, 140):
        desk.orders(number, owner=BOB)
    served = order_of_service(desk, current, 10)
    assert 4 <= sum(desk.job(job).owner == BOB for job in served) <= 6


def test_an_order_that_came_before_any_site_ends_once_the_sites_have_spoken_and_none_has_its_model() -> None:
    desk = Desk()
    hopeless, hopeful = desk.orders(1, model=ModelRef("nobody/has-this")), desk.orders(2, model=ModelRef("late/model"))
    desk.passes(3_600_000)
    assert {desk.job(job).status for job in (hopeless, hopeful)} == {JobStatus.QUEUED}, "no site is known yet"
    desk.advert(A)
    desk.passes(5_000, A)
    assert desk.job(hopeless).status is JobStatus.QUEUED, "another site may still be on its way"
    desk.advert(B, models=(an_offer("late/model"),))
    assert desk.job(hopeful).status is JobStatus.PLACED
    desk.accepts(hopeful)
    desk.passes(desk.policy.suspect_ms, A, B)
    failure = desk.job(hopeless).failure
    assert desk.job(hopeless).status is JobStatus.FAILED
    assert failure is not None
    assert failure.text.startswith("No site of this mesh offers the model nobody/has-this.")
    assert "late/model" in failure.text
