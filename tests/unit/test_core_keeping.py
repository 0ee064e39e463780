"""Kept results: whose bytes they count as, when an order is refused for them, and that a deletion ends only when it is done."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.core import events as ev
from coordinator.core.decision import PublishRefusal, PurgeJob
from coordinator.core.state import MeshState, Policy, evolve, forget_job, keep
from edif_mesh.domain.attempt import AttemptStatus, Blame
from edif_mesh.domain.ids import JobId, KeyId, SiteId
from edif_mesh.domain.job import JobStatus
from edif_mesh.wire.messages import JobSnapshot, LeaseRenewed, Lender, Refusal
from tests.builders import ALICE, BOB, Desk, a_manifest, replies

A, B = "ansbach", "bamberg"
DAY_MS = 86_400_000


def succeeded(desk: Desk, number: int = 1, owner: KeyId = ALICE, **manifest: Any) -> JobId:
    """A job of the owner that has ended with a result, of 100 bytes unless said otherwise."""
    job = desk.orders(number, owner)
    desk.accepts(job)
    desk.reports(job, AttemptStatus.SUCCEEDED, opened=a_manifest(desk.job(job), desk.attempt(job), **manifest))
    return job


def a_desk(**policy: Any) -> Desk:
    desk = Desk(Policy(**policy))
    desk.advert(A)
    return desk


def delete(desk: Desk, job: JobId, by: KeyId = ALICE) -> Any:
    return desk.happens(ev.DeletionAsked(job, by, "reply"))


def purges(sends: Any) -> list[JobId]:
    return [item.job for item in sends if isinstance(item, PurgeJob)]


def drops(desk: Desk, *dropped: JobId) -> tuple[JobId, ...]:
    """What the site is told to drop when it says that it has dropped these."""
    (answer,) = [reply for reply in replies(desk.advert(A, dropped=dropped)) if isinstance(reply, LeaseRenewed)]
    return answer.drop


def test_a_deletion_goes_on_until_the_broker_and_every_site_have_done_it() -> None:
    desk = a_desk()
    job = succeeded(desk)
    assert desk.sees(job).result_bytes == 100
    decision = delete(desk, job)
    (answer,) = replies(decision)
    assert isinstance(answer, JobSnapshot)
    assert (answer.deleted_at_ms, answer.result_bytes, answer.manifest) == (desk.now_ms, 0, None)
    assert "still to be deleted at: the broker, ansbach" in answer.text
    assert purges(decision.send) == [job]
    desk.sent.clear()
    desk.happens(ev.JobPurged(job))  # this one does not count: the site may still store something
    assert drops(desk) == (job,)
    assert drops(desk, job) == ()
    desk.passes(3000)
    assert job in purges(desk.sent)  # nobody has said that it is done
    desk.happens(ev.JobPurged(job))
    desk.sent.clear()
    desk.passes(3000)
    assert purges(desk.sent) == []
    assert desk.sees(job).text == "Succeeded at ansbach. Its owner has deleted its payload, result and lines."
    assert not desk.state.deleting
    told = [change.what for change in desk.record if getattr(change, "job", None) == job and hasattr(change, "what")]
    assert told[-3:] == ["result deletion asked", "result deleted at a site", "result deleted at the broker"]


def test_only_the_owner_deletes_and_only_what_has_ended() -> None:
    desk = a_desk()
    job = succeeded(desk)
    running = desk.orders(2)
    for decision, code in ((delete(desk, job, BOB), "not_found"), (delete(desk, running), "still_running")):
        (answer,) = replies(decision)
        assert isinstance(answer, Refusal)
        assert answer.failure.code == code
        assert purges(decision.send) == []
    assert desk.sees(job).deleted_at_ms is None


def test_a_second_request_changes_nothing_and_a_failed_job_can_be_deleted_too() -> None:
    desk = a_desk()
    job = succeeded(desk)
    delete(desk, job)
    version = desk.job(job).version
    desk.passes(1000)
    delete(desk, job)
    assert desk.job(job).version == version
    failed = desk.orders(2)
    desk.accepts(failed)
    desk.fails(failed, Blame.USER)
    delete(desk, failed)
    assert desk.sees(failed).deleted_at_ms is not None
    assert desk.sees(failed).status is JobStatus.FAILED


def test_chunks_that_another_kept_result_uses_stay_until_that_one_goes() -> None:
    desk = a_desk()
    lender = succeeded(desk, 1)
    user = succeeded(desk, 2, lenders=(Lender(lender, desk.attempt(lender).attempt),), stored_bytes=7)
    assert purges(delete(desk, lender).send) == []
    assert f"its chunks go when {user}" in desk.sees(lender).text
    desk.sent.clear()
    desk.passes(5000)
    assert purges(desk.sent) == []
    assert purges(delete(desk, user).send) == [user]
    drops(desk, lender, user)
    desk.sent.clear()
    desk.passes(1000)
    assert lender in purges(desk.sent)


def test_a_result_that_stores_nothing_itself_keeps_its_lender_too() -> None:
    desk = a_desk()
    lender = succeeded(desk, 1)
    user = succeeded(desk, 2, lenders=(Lender(lender, desk.attempt(lender).attempt),), stored_bytes=0)
    assert purges(delete(desk, lender).send) == []
    delete(desk, user)
    drops(desk, lender, user)
    desk.passes(1000)
    assert lender in purges(desk.sent)


@pytest.mark.parametrize("owner", [ALICE, BOB])
def test_a_result_that_uses_what_was_deleted_meanwhile_or_is_another_s_is_made_again(owner: KeyId) -> None:
    desk = a_desk()
    lender = succeeded(desk, 1, owner)
    user = desk.orders(2)
    desk.accepts(user)
    attempt = desk.attempt(user)
    if owner == ALICE:
        delete(desk, lender)
    lenders = (Lender(lender, desk.attempt(lender).attempt),)
    desk.reports(user, AttemptStatus.SUCCEEDED, opened=a_manifest(desk.job(user), attempt, lenders=lenders))
    assert desk.job(user).status is not JobStatus.SUCCEEDED
    failure = desk.attempt(user).failure
    assert failure is not None
    assert f"uses chunks of {lender} again" in failure.text
    desk.passes(10_000, A)
    desk.accepts(user)
    again = desk.attempt(user)
    assert again.attempt == attempt.attempt + 1
    desk.reports(user, AttemptStatus.SUCCEEDED, opened=a_manifest(desk.job(user), again))
    assert desk.job(user).status is JobStatus.SUCCEEDED


def test_a_result_is_kept_no_longer_than_the_chunks_that_it_uses() -> None:
    desk = a_desk(keep_results_ms=DAY_MS)
    lender = succeeded(desk, 1)
    desk.passes(3_600_000, A, step_ms=60_000)
    user = succeeded(desk, 2, lenders=(Lender(lender, desk.attempt(lender).attempt),))
    assert desk.sees(user).keep_until_ms == desk.sees(lender).keep_until_ms


def test_who_keeps_too_much_orders_nothing_new_and_others_do() -> None:
    desk = a_desk(max_kept_bytes=150)
    first, _ = succeeded(desk, 1), succeeded(desk, 2)
    decision = desk.happens(_order(desk, 3, ALICE))
    (refusal,) = [item.refusal for item in decision.send if isinstance(item, PublishRefusal)]
    assert refusal.failure.code == "kept_full"
    assert "edif rm" in refusal.failure.text
    assert succeeded(desk, 4, BOB) in desk.state.kept
    delete(desk, first)
    assert desk.orders(5) in desk.state.jobs


def test_what_is_past_its_time_counts_no_more_and_is_said_to_be_gone() -> None:
    desk = a_desk(max_kept_bytes=50, keep_results_ms=3_600_000)
    job = succeeded(desk)
    desk.passes(3_660_000, A, step_ms=60_000)
    assert desk.state.kept_bytes == desk.state.kept_bytes_at == {}
    seen = desk.sees(job)
    assert seen.manifest is None
    assert "kept for as long as" in seen.text
    assert desk.orders(2) in desk.state.jobs


def test_a_site_whose_results_take_too_much_gets_no_more_and_another_does() -> None:
    desk = a_desk(max_site_kept_bytes=100)
    succeeded(desk)
    waiting = desk.orders(2)
    assert desk.job(waiting).status is JobStatus.QUEUED
    (verdict,) = desk.sees(waiting, explain=True).why
    assert [reason.code for reason in verdict.reasons] == ["kept_full"]
    desk.advert(B)
    assert desk.attempt(waiting).site == B


def test_a_full_store_refuses_new_orders_and_goes_on_with_accepted_ones() -> None:
    desk = a_desk()
    accepted = desk.orders(1)
    desk.happens(ev.StoreMeasured("The mesh's store is nearly full."))
    decision = desk.happens(_order(desk, 2, ALICE))
    (refusal,) = [item.refusal for item in decision.send if isinstance(item, PublishRefusal)]
    assert (refusal.failure.code, refusal.failure.text) == ("store_full", "The mesh's store is nearly full.")
    desk.accepts(accepted)
    desk.reports(accepted, AttemptStatus.SUCCEEDED)
    assert desk.job(accepted).status is JobStatus.SUCCEEDED
    desk.happens(ev.StoreMeasured(""))
    assert desk.orders(3) in desk.state.jobs


def test_the_index_of_kept_results_is_the_same_after_a_restart_and_outlives_memory() -> None:
    desk = a_desk()
    lender = succeeded(desk, 1)
    succeeded(desk, 2, lenders=(Lender(lender, desk.attempt(lender).attempt),), stored_bytes=7)
    gone = succeeded(desk, 3, BOB)
    delete(desk, gone, BOB)
    again = MeshState(desk.state.federation, desk.policy)
    for change in desk.record:
        evolve(again, change)
    for record in list(again.jobs.values()):
        keep(again, record)
    for name in ("kept", "kept_bytes", "kept_bytes_at", "borrowed", "deleting"):
        assert getattr(again, name) == getattr(desk.state, name), name
    assert desk.state.kept_bytes == {ALICE: 107}
    assert desk.state.kept_bytes_at == {SiteId(A): 107}
    forget_job(desk.state, lender)
    forget_job(desk.state, gone)
    assert lender not in desk.state.jobs
    assert lender in desk.state.kept
    assert gone in desk.state.jobs  # its deletion is not done


@pytest.mark.parametrize("jobs", [(), (JobId("j0000000000000000000000f"),)])
def test_a_site_that_says_what_nobody_asked_changes_nothing(jobs: tuple[JobId, ...]) -> None:
    desk = a_desk()
    job = succeeded(desk)
    assert drops(desk, *jobs, job) == ()
    assert desk.sees(job).result_bytes == 100


def _order(desk: Desk, number: int, owner: KeyId) -> ev.OrderReceived:
    from edif_mesh.domain.ids import Digest
    from tests.builders import an_order

    return ev.OrderReceived(an_order(number), Digest(f"{number:064x}"), f"envelope {number}", owner)
