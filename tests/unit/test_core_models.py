"""How the coordinator reckons with models that come and go: who can hold one, who could make room, and at what price."""

from __future__ import annotations

import pytest

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.job import JobStatus
from edif_mesh.domain.site import ModelOffer, ModelRef, ModelState
from tests.builders import T0, Desk, an_offer, refusals

A, B = "ansbach", "heilbronn"
GB = 10**9
LOADED, LOADABLE, LOADING = ModelState.LOADED, ModelState.LOADABLE, ModelState.LOADING


def a_model(name: str, state: ModelState = LOADABLE, size: int = GB, **fields: object) -> ModelOffer:
    return an_offer(name, state=state, weights_bytes=size, memory_bytes=size, **fields)


def a_desk(*models: ModelOffer, budget: int = 2 * GB, **fields: object) -> Desk:
    desk = Desk()
    desk.advert(A, models=models, models_bytes=budget, slots=8, free_slots=8, memory_bytes=1 << 40, **fields)
    return desk


def test_a_model_that_can_never_fit_is_refused_at_once_with_the_arithmetic() -> None:
    desk = a_desk(a_model("m/pinned", LOADED, pinned=True), a_model("m/large", size=3 * GB // 2))
    desk.orders(model=ModelRef("m/large"))
    (refusal,) = refusals(desk.sent)
    assert refusal.failure.code == "too_large"
    assert (
        "m/large needs 1.50 GB; ansbach gives 2.00 GB to models, of which 1.00 GB stay with m/pinned"
        in refusal.failure.text
    )


def test_a_failed_offer_that_is_too_large_is_refused_as_too_large() -> None:
    desk = a_desk(a_model("m/large", ModelState.FAILED, size=3 * GB, detail="m/large needs 3.00 GB"))
    desk.orders(model=ModelRef("m/large"))
    assert refusals(desk.sent)[0].failure.code == "too_large"


@pytest.mark.parametrize(
    ("resident", "why"),
    [
        ({"evictable_at_ms": T0 + 40_000}, "stays for 25 s more"),
        ({"state": LOADING}, "being loaded"),
    ],
)
def test_a_job_waits_while_what_is_loaded_must_stay(resident: dict[str, object], why: str) -> None:
    fields = {"state": LOADED, **resident}
    desk = a_desk(a_model("m/a", **fields), a_model("m/b"), budget=3 * GB // 2)  # type: ignore[arg-type]
    job = desk.orders(model=ModelRef("m/b"))
    assert desk.job(job).status is JobStatus.QUEUED
    (verdict,) = desk.sees(job, explain=True).why
    assert [reason.code for reason in verdict.reasons] == ["no_room"]
    assert f"m/a 1.00 GB ({why})" in verdict.reasons[0].text


def test_the_residency_runs_on_by_the_sites_clock_between_adverts() -> None:
    desk = a_desk(a_model("m/a", LOADED, evictable_at_ms=T0 + 12_000), a_model("m/b"), budget=GB)
    desk.advert(A, issued_at_ms=T0)  # its clock is 15 s behind ours
    job = desk.orders(model=ModelRef("m/b"))
    desk.passes(11_000, step_ms=500)
    assert desk.job(job).status is JobStatus.QUEUED
    desk.passes(2_000, step_ms=500)
    assert desk.job(job).status is JobStatus.PLACED


def test_two_cold_models_are_not_granted_to_a_site_that_has_room_for_one() -> None:
    desk = a_desk(a_model("m/a", LOADED), a_model("m/b"), a_model("m/c"), budget=GB)
    first, second = desk.orders(1, model=ModelRef("m/b")), desk.orders(2, model=ModelRef("m/c"))
    assert desk.job(first).status is JobStatus.PLACED
    assert desk.job(second).status is JobStatus.QUEUED
    desk.accepts(first)
    desk.reports(first, AttemptStatus.SUCCEEDED)
    desk.advert(A, models=(a_model("m/a"), a_model("m/b", LOADED), a_model("m/c")))
    assert desk.job(second).status is JobStatus.PLACED


def test_a_model_that_must_leave_for_our_own_grant_is_no_longer_warm() -> None:
    desk = a_desk(a_model("m/a", LOADED), a_model("m/b"), budget=GB)
    desk.orders(1, model=ModelRef("m/b"))
    second = desk.orders(2, model=ModelRef("m/a"))
    assert desk.job(second).status is JobStatus.QUEUED
    assert [r.code for v in desk.sees(second, explain=True).why for r in v.reasons] == ["no_room"]


def test_a_loaded_model_that_turned_out_larger_than_the_budget_is_used_while_it_is_there() -> None:
    desk = a_desk(a_model("m/a", LOADED, size=3 * GB), a_model("m/b"), budget=2 * GB)
    assert desk.job(desk.orders(1, model=ModelRef("m/a"))).status is JobStatus.PLACED


def test_more_jobs_for_the_model_that_is_coming_go_there_too() -> None:
    desk = a_desk(a_model("m/a", LOADED), a_model("m/b"), budget=GB)
    desk.orders(1, model=ModelRef("m/b"))
    assert desk.job(desk.orders(2, model=ModelRef("m/b"))).status is JobStatus.PLACED


def test_a_warm_site_is_chosen_before_one_that_must_load() -> None:
    desk = Desk()
    desk.advert(A, models=(a_model("m/a"),), models_bytes=2 * GB)
    desk.advert(B, models=(a_model("m/a", LOADED),), models_bytes=2 * GB)
    assert desk.attempt(desk.orders(model=ModelRef("m/a"))).site == B


def test_a_site_with_free_memory_is_chosen_before_one_that_must_evict() -> None:
    for full in (A, B):
        desk = Desk()
        for site in (A, B):
            other = a_model("m/b", LOADED if site == full else LOADABLE)
            desk.advert(site, models=(a_model("m/a"), other), models_bytes=GB)
        job = desk.orders(model=ModelRef("m/a"))
        assert desk.attempt(job).site == (B if full == A else A)
        terms = {verdict.site: verdict.terms for verdict in desk.attempt(job).verdicts}
        assert terms[full]["evict"] == terms[full]["load"] == 4.0  # type: ignore[index]
        assert terms[desk.attempt(job).site]["evict"] == 0.0


def test_a_site_that_states_no_budget_is_given_any_model() -> None:
    desk = a_desk(a_model("m/a", LOADED), a_model("m/b", size=100 * GB), budget=0)
    assert desk.job(desk.orders(model=ModelRef("m/b"))).status is JobStatus.PLACED


def test_using_a_model_does_not_make_an_advert_worth_writing_down() -> None:
    desk = a_desk(a_model("m/a", LOADED))
    for fields, durable in (({"used_at_ms": T0 + 1}, False), ({"evictable_at_ms": T0 + 1}, True)):
        decision = desk.advert(A, models=(a_model("m/a", LOADED, **fields),))  # type: ignore[arg-type]
        assert [change.durable for change in decision.record if hasattr(change, "durable")] == [durable]


def test_a_model_in_steady_use_makes_room_for_one_that_was_asked_for_before() -> None:
    desk = a_desk(a_model("m/a", LOADED), a_model("m/b"), budget=GB)
    running = desk.orders(1, model=ModelRef("m/a"))
    desk.accepts(running)
    waiting, later = desk.orders(2, model=ModelRef("m/b")), desk.orders(3, model=ModelRef("m/a"))
    assert desk.job(later).status is JobStatus.QUEUED
    desk.reports(running, AttemptStatus.RUNNING)
    desk.reports(running, AttemptStatus.SUCCEEDED)
    assert desk.job(waiting).status is JobStatus.PLACED
    assert desk.job(later).status is JobStatus.QUEUED


def test_a_model_in_steady_use_goes_on_while_it_may_not_be_evicted_anyhow() -> None:
    desk = a_desk(a_model("m/a", LOADED, evictable_at_ms=T0 + 10**6), a_model("m/b"), budget=GB)
    desk.accepts(desk.orders(1, model=ModelRef("m/a")))
    desk.orders(2, model=ModelRef("m/b"))
    assert desk.job(desk.orders(3, model=ModelRef("m/a"))).status is JobStatus.PLACED


def test_only_one_site_is_cleared_for_a_waiting_model() -> None:
    desk = Desk()
    for site in (A, B):
        desk.advert(site, models=(a_model("m/a", LOADED), a_model("m/b")), models_bytes=GB)
    for number in (1, 2):
        desk.accepts(desk.orders(number, model=ModelRef("m/a")))
    desk.orders(3, model=ModelRef("m/b"))
    assert desk.job(desk.orders(4, model=ModelRef("m/a"))).status is JobStatus.PLACED
    assert desk.job(desk.orders(5, model=ModelRef("m/a"))).status is JobStatus.QUEUED
