"""When an attempt counts as lost, when it does not, and what an older attempt may still do."""

from __future__ import annotations

import pytest

from coordinator.core import events as ev
from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.ids import BootId, Epoch, JobId, SiteId
from edif_mesh.domain.job import JobStatus
from edif_mesh.domain.site import SiteStatus
from edif_mesh.wire.messages import AttemptRef, LeaseRenewed, Report, ReportReceived
from tests.builders import Desk, a_manifest, grants, replies

A, B, C = "ansbach", "bamberg", "coburg"


def running_at_a(*others: str) -> tuple[Desk, JobId]:
    """Return a desk with a job that runs at `A`; the other sites joined after it was placed."""
    desk = Desk()
    desk.advert(A)
    job = desk.orders()
    desk.accepts(job)
    desk.reports(job, AttemptStatus.RUNNING)
    for site in others:
        desk.advert(site)
    return desk, job


def test_a_listed_attempt_keeps_its_lease_for_as_long_as_its_site_speaks() -> None:
    desk, job = running_at_a(B)
    desk.passes(600_000, A, B)
    assert desk.job(job).status is JobStatus.RUNNING
    assert desk.job(job).attempt == 1


def test_a_silent_site_gets_no_new_work_and_loses_its_attempt_only_after_the_whole_lease() -> None:
    desk, job = running_at_a(B)
    deadline = desk.attempt(job).deadline_at_ms
    desk.passes(deadline - desk.now_ms - 1000, B)
    assert desk.job(job).attempt == 1
    assert desk.state.sites[SiteId(A)].status is not SiteStatus.ACTIVE
    desk.passes(2000, B)
    assert desk.attempt(job, 1).status is AttemptStatus.LOST
    assert (desk.attempt(job).site, desk.job(job).status) == (B, JobStatus.PLACED)
    assert desk.sees(job).text == f"Placed at {B} (attempt 2; {A} was lost)."


def test_a_restarted_agent_that_lists_nothing_moves_its_attempts_at_once() -> None:
    desk, job = running_at_a(B)
    desk.now_ms += 1
    assert grants(desk.advert(A, boot=BootId("new"), sequence=1)) == [(B, 2)]
    assert "restarted" in desk.attempt(job, 1).failure.text  # type: ignore[union-attr]


def test_the_last_words_of_an_older_run_of_an_agent_are_not_believed() -> None:
    desk, job = running_at_a(B)
    desk.advert(A, boot=BootId("older"), issued_at_ms=desk.now_ms - 10_000, sequence=900)
    assert desk.job(job).attempt == 1
    assert desk.state.sites[SiteId(A)].advert.boot == f"{A}-boot-1"


def test_a_forgotten_attempt_moves_after_two_adverts_but_not_after_one_that_crossed_the_grant() -> None:
    desk, job = running_at_a(B)
    desk.advert(A)
    desk.advert(A)
    desk.advert(A)
    assert desk.job(job).attempt == 1, "adverts written before the grant arrived prove nothing"
    desk.now_ms += 5000
    desk.advert(A)
    desk.advert(A, sequence=desk.state.sites[SiteId(A)].advert.sequence)
    assert desk.job(job).attempt == 1, "the same advert twice is one advert"
    desk.now_ms += 5000
    assert grants(desk.advert(A)) == [(B, 2)]


def test_a_disconnected_site_has_a_short_grace_to_return() -> None:
    desk, job = running_at_a(B)
    desk.happens(ev.SiteDisconnected(SiteId(A)))
    desk.passes(1000, B)
    desk.advert(A, attempts=desk.held_at(A))
    desk.passes(4000, A, B)
    assert desk.job(job).attempt == 1
    desk.happens(ev.SiteDisconnected(SiteId(A)))
    desk.passes(desk.policy.disconnect_grace_ms, B)
    assert desk.attempt(job).site == B
    assert desk.now_ms < desk.attempt(job, 1).deadline_at_ms


def test_a_site_gets_no_work_between_its_disconnection_and_its_return() -> None:
    desk = Desk()
    desk.advert(A)
    desk.happens(ev.SiteDisconnected(SiteId(A)))
    job = desk.orders()
    assert desk.job(job).status is JobStatus.QUEUED
    assert grants(desk.advert(A)) == [(A, 1)]


def test_a_grant_that_nobody_heard_moves_at_once_and_the_site_waits_for_its_next_advert() -> None:
    desk = Desk()
    desk.advert(A)
    job = desk.orders()
    desk.happens(ev.GrantUndelivered(job, desk.attempt(job).attempt, SiteId(A)))
    for _ in range(10):
        desk.passes(1000)
    assert desk.job(job).attempt == 1, "a dead site must not burn the attempts of the job"
    assert grants(desk.advert(A)) == [(A, 2)]


def test_an_undelivered_repetition_does_not_move_a_job_whose_first_grant_may_have_arrived() -> None:
    desk = Desk()
    desk.advert(A)
    desk.advert(B)
    job = desk.orders()
    desk.passes(2000)
    desk.happens(ev.GrantUndelivered(job, desk.attempt(job).attempt, desk.attempt(job).site))
    assert desk.job(job).attempt == 1


def test_a_grant_is_repeated_until_it_is_answered() -> None:
    desk = Desk()
    desk.advert(A)
    job = desk.orders()
    desk.sent.clear()
    desk.passes(3000)
    assert len(desk.sent) == 3
    desk.accepts(job)
    desk.sent.clear()
    desk.passes(4000)
    assert desk.sent == []


def test_the_coordinators_own_lost_link_expires_nothing() -> None:
    desk, job = running_at_a(B)
    desk.happens(ev.LinkLost())
    desk.passes(120_000)
    desk.happens(ev.LinkReturned())
    desk.passes(1000)
    desk.passes(60_000, A, B)
    assert desk.job(job).attempt == 1


def test_a_coordinator_that_stood_still_expires_nothing() -> None:
    desk, job = running_at_a(B)
    desk.passes(10_000, A, B)
    desk.now_ms += 90_000
    desk.happens(ev.Ticked())
    desk.passes(60_000, A, B)
    assert desk.job(job).attempt == 1
    assert desk.state.sites[SiteId(A)].status is SiteStatus.ACTIVE


def test_a_new_term_renews_every_lease() -> None:
    desk, job = running_at_a(B)
    desk.now_ms += 600_000
    desk.happens(ev.TermStarted(Epoch(2)))
    desk.passes(1000)
    desk.passes(60_000, A, B)
    assert desk.job(job).attempt == 1
    assert desk.state.epoch == 2


def test_mass_silence_freezes_expiry_but_not_for_ever() -> None:
    desk, job = running_at_a(B, C)
    desk.passes(60_000, C)
    assert desk.job(job).attempt == 1, "two of three silent together: the fault is central"
    desk.passes(desk.policy.max_freeze_ms, C)
    assert desk.attempt(job).site == C, "sites that are really gone must not hold a job for ever"


def test_a_late_success_of_a_lost_attempt_is_acknowledged_kept_and_not_applied() -> None:
    desk, job = running_at_a(B)
    desk.passes(40_000, B)
    decision = desk.reports(job, AttemptStatus.SUCCEEDED, number=1)
    (reply,) = replies(decision)
    assert isinstance(reply, ReportReceived)
    assert not reply.result_committed
    assert desk.job(job).status is JobStatus.PLACED
    assert desk.attempt(job, 1).receipt is not None
    desk.accepts(job)
    (reply,) = replies(desk.reports(job, AttemptStatus.SUCCEEDED))
    assert isinstance(reply, ReportReceived)
    assert reply.result_committed
    assert (desk.job(job).result_site, desk.job(job).manifest) == (B, f"manifest of {B}")


def test_a_repeated_success_is_acknowledged_as_committed_and_commits_nothing_more() -> None:
    desk, job = running_at_a()
    desk.reports(job, AttemptStatus.SUCCEEDED)
    before = desk.job(job)
    (reply,) = replies(desk.reports(job, AttemptStatus.SUCCEEDED, sequence=desk.attempt(job).sequence))
    assert isinstance(reply, ReportReceived)
    assert reply.result_committed
    assert desk.job(job) == before
    desk.reports(job, AttemptStatus.FAILED)
    assert desk.job(job) == before


def test_a_report_of_an_unknown_job_is_acknowledged_so_that_the_site_drops_it() -> None:
    desk, job = running_at_a()
    attempt = desk.attempt(job)
    digest = desk.job(job).order_digest
    report = Report(
        attempt.site, BootId("b"), job, attempt.attempt, 9, AttemptStatus.FAILED, 0, digest, epoch=attempt.epoch
    )
    (reply,) = replies(Desk().happens(ev.SiteReported(report, None, "report")))
    assert isinstance(reply, ReportReceived)
    assert not reply.result_committed


def test_a_coordinator_of_an_older_term_tells_no_site_to_forget_a_report() -> None:
    desk, job = running_at_a()
    assert replies(desk.reports(job, AttemptStatus.SUCCEEDED, epoch=Epoch(2))) == []
    assert desk.job(job).status is JobStatus.RUNNING


def test_a_report_for_another_sites_attempt_changes_nothing() -> None:
    desk, job = running_at_a(B)
    desk.reports(job, AttemptStatus.FAILED, site=SiteId(B))
    assert desk.job(job).status is JobStatus.RUNNING


@pytest.mark.parametrize("wrong", [{"site": SiteId(B)}, {"attempt": 2}, {"order_digest": "f" * 64}, None])
def test_a_success_whose_manifest_does_not_fit_is_no_success(wrong: dict[str, object] | None) -> None:
    desk, job = running_at_a(B)
    opened = None if wrong is None else a_manifest(desk.job(job), desk.attempt(job), **wrong)
    desk.reports(job, AttemptStatus.SUCCEEDED, opened=opened)
    assert desk.attempt(job, 1).status is AttemptStatus.FAILED
    assert desk.attempt(job).site == B


def test_only_current_attempts_are_named_in_a_renewal() -> None:
    desk, job = running_at_a(B)
    desk.passes(40_000, B)
    (reply,) = replies(desk.advert(A, attempts=(AttemptRef(job, desk.attempt(job, 1).attempt, AttemptStatus.RUNNING),)))
    assert isinstance(reply, LeaseRenewed)
    assert reply.attempts == ()


def test_a_running_attempts_start_is_its_first_report_of_running() -> None:
    desk, job = running_at_a()
    began = desk.attempt(job).started_at_ms
    desk.now_ms += 1000
    desk.reports(job, AttemptStatus.RUNNING)
    assert desk.attempt(job).started_at_ms == began


def test_a_site_that_reports_a_grant_back_does_not_free_the_job_for_a_second_attempt() -> None:
    desk = Desk()
    desk.advert(A)
    desk.advert(B)
    job = desk.orders()
    desk.reports(job, AttemptStatus.GRANTED)
    assert (desk.job(job).status, desk.job(job).attempt) == (JobStatus.PLACED, 1)


def test_a_report_that_was_overtaken_by_a_newer_one_is_not_applied() -> None:
    desk, job = running_at_a(B)
    desk.reports(job, AttemptStatus.RUNNING, sequence=7)
    desk.reports(job, AttemptStatus.FAILED, sequence=6)
    assert (desk.job(job).status, desk.job(job).attempt) == (JobStatus.RUNNING, 1)


def test_an_answer_to_a_repeated_grant_starts_the_count_of_missing_adverts_anew() -> None:
    desk = Desk()
    desk.advert(A)
    job = desk.orders()
    desk.passes(2000)
    desk.accepts(job)
    desk.now_ms += 5000
    desk.advert(A)
    assert desk.job(job).attempt == 1, "one advert without it may be an old one"


def test_a_late_advert_of_the_old_agent_does_not_end_what_the_new_one_has_taken() -> None:
    desk = Desk()
    desk.advert(A)
    job = desk.orders()
    desk.accepts(job, boot="the new agent, whose first advert is still on its way")
    desk.advert(A)
    assert desk.job(job).attempt == 1


def test_a_site_that_hands_an_attempt_back_gets_no_other_before_it_has_spoken() -> None:
    """It is being drained, and its word about the attempt may arrive before its advert that says so."""
    desk, job = running_at_a(B)
    waiting = [desk.orders(number) for number in range(2, 10)]
    assert JobStatus.QUEUED in {desk.job(other).status for other in waiting}
    assert grants(desk.reports(job, AttemptStatus.RELEASED, detail="The site is being drained.")) == []
    assert desk.state.sites[SiteId(A)].status is SiteStatus.SUSPECT
    assert (A, 1) in grants(desk.advert(A, attempts=()))
