"""Which models a site loads, which ones it evicts for them, and what it says when there is no room."""

from __future__ import annotations

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.room import Resident, never_fits, plan_room
from site_agent.core import events as ev
from site_agent.core.effects import EvictModel, LoadModel, SendAdvert, StartAttempt
from site_agent.core.residence import evictable_bytes
from tests.builders_agent import AgentDesk, an_offer

GB = 10**9
A, B, C, D = "m/a", "m/b", "m/c", "m/d"


def a_desk(budget: int = 2 * GB, residency_ms: int = 0) -> AgentDesk:
    """Four models of 1 GB; `a` and `b` are loaded, `a` was used first."""
    desk = AgentDesk([an_offer(name, GB) for name in (A, B, C, D)], budget, residency_ms)
    for name in (A, B):
        key = desk.asks(name)
        desk.loaded(name)
        desk.ends(key)
        desk.ticks()
    return desk


def test_the_least_recently_used_model_goes_and_the_load_waits_until_its_memory_is_free() -> None:
    desk = a_desk()
    desk.uses(A)
    key = desk.asks(C)
    assert desk.states() == {A: "LOADED", B: "EVICTING", C: "LOADING", D: "LOADABLE"}
    assert desk.evicting == [B]
    assert desk.loading == []
    desk.ticks()
    assert desk.loading == [], "its memory is not free before the other host is gone"
    assert LoadModel(C) in desk.evicted(B)
    assert StartAttempt(desk.state.held[key]) not in desk.done
    desk.loaded(C)
    assert desk.running == {key: C}
    assert desk.states() == {A: "LOADED", B: "LOADABLE", C: "LOADED", D: "LOADABLE"}


def test_every_step_is_advertised_at_once() -> None:
    desk = a_desk()
    desk.asks(C)
    assert SendAdvert() in desk.done
    for step in (lambda: desk.evicted(A), lambda: desk.loaded(C), lambda: desk.happens(ev.HostLost(C, "x"))):
        assert SendAdvert() in step()
    desk.ticks()
    desk.loading.clear()
    assert SendAdvert() in desk.happens(ev.ModelFailed(D, "x"))


def test_the_offer_says_until_when_a_model_stays_and_when_it_was_used() -> None:
    desk = a_desk(residency_ms=60_000)
    loaded_at = desk.offer(B).evictable_at_ms - 60_000
    assert loaded_at == desk.now.wall_ms - 250
    desk.uses(B)
    assert desk.offer(B).used_at_ms == desk.now.wall_ms


def test_a_model_stays_for_its_minimum_residency_and_the_refusal_says_how_long() -> None:
    desk = a_desk(residency_ms=60_000)
    assert desk.declined(C) == (
        "m/c needs 1.00 GB; ansbach gives 2.00 GB to models, of which 0.00 GB are free: "
        "m/a 1.00 GB (stays for 60 s more), m/b 1.00 GB (stays for 60 s more)."
    )
    assert evictable_bytes(desk.state, desk.now) == 0
    desk.ticks(59_500)  # a is old enough by now, b a quarter of a second too young
    assert evictable_bytes(desk.state, desk.now) == GB
    desk.uses(A)  # the younger one was used less recently, and stays all the same
    desk.now = type(desk.now)(desk.now.wall_ms - 1000, desk.now.monotonic_ms - 1000)
    desk.asks(C)
    assert desk.evicting == [A]


def test_a_model_in_use_is_never_evicted() -> None:
    desk = a_desk()
    desk.asks(A)
    key = desk.asks(B)
    assert "m/a 1.00 GB (in use), m/b 1.00 GB (in use)" in desk.declined(C)
    desk.ends(key)
    desk.asks(C)
    assert desk.evicting == [B]


def test_a_model_whose_runner_is_being_stopped_is_in_use_until_it_is_gone() -> None:
    desk = a_desk()
    desk.asks(A)
    key = desk.asks(B)
    desk.happens(ev.DrainRequested())
    desk.state.status = desk.state.status.ACTIVE
    assert "in use" in desk.declined(C)
    desk.happens(ev.AttemptStopped(key))
    desk.asks(C)
    assert desk.evicting == [B]


def test_a_result_on_its_way_keeps_no_model() -> None:
    desk = a_desk()
    desk.uses(A)
    key = desk.asks(B)
    desk.happens(ev.AttemptComputed(key))
    desk.uses(A)
    desk.asks(C)
    assert desk.evicting == [B]


def test_a_model_that_is_being_loaded_is_not_evicted_and_its_attempt_goes_on() -> None:
    desk = a_desk()
    first = desk.asks(C)
    desk.evicted(A)
    second = desk.asks(D)
    assert desk.states() == {A: "LOADABLE", B: "EVICTING", C: "LOADING", D: "LOADING"}
    assert "m/c 1.00 GB (being loaded)" in desk.declined(A)
    desk.loaded(C)
    assert desk.running == {first: C}
    desk.evicted(B)
    desk.loaded(D)
    assert desk.running == {first: C, second: D}


def test_a_pinned_model_is_loaded_at_start_and_never_goes() -> None:
    desk = AgentDesk([an_offer(A, GB), an_offer(B, GB, pinned=True), an_offer(C, GB)], 2 * GB)
    desk.ticks()
    assert desk.loading == [B]
    desk.loaded(B)
    desk.ends(desk.asks(B))
    key = desk.asks(A)
    desk.loaded(A)
    desk.ends(key)
    desk.asks(C)
    assert desk.evicting == [A]


def test_the_memory_of_a_pinned_model_is_kept_for_it_while_its_host_is_down() -> None:
    desk = AgentDesk([an_offer(A, GB, pinned=True), an_offer(B, GB), an_offer(C, GB)], 2 * GB)
    desk.ticks()
    desk.loaded(A)
    desk.ends(desk.asks(A))
    desk.happens(ev.HostLost(A, "killed"))
    desk.asks(B)
    desk.loaded(B)
    assert "m/a 1.00 GB (pinned)" in desk.declined(C)
    desk.ticks()
    assert desk.loading == [A]


def test_preloads_take_what_is_free_and_evict_nothing() -> None:
    desk = AgentDesk([an_offer(name, GB) for name in (A, B, C)], 2 * GB, preload=(A, B, C))
    desk.ticks()
    assert desk.loading == [A, B]
    desk.loaded(A)
    desk.loaded(B)
    desk.ticks()
    assert (desk.loading, desk.evicting) == ([], [])


def test_what_was_evicted_comes_back_only_when_it_is_asked_for() -> None:
    desk = AgentDesk([an_offer(A, GB), an_offer(B, GB)], GB, preload=(A,))
    desk.ticks()
    desk.loaded(A)
    desk.asks(B)
    desk.evicted(A)
    desk.loading.clear()
    desk.happens(ev.ModelFailed(B, "no memory"))
    desk.ticks(10**6)
    assert desk.loading == []


def test_a_preload_that_failed_evicts_nothing_when_it_is_tried_again() -> None:
    desk = AgentDesk([an_offer(A, GB), an_offer(B, GB)], GB, preload=(A,))
    desk.ticks()
    desk.loading.clear()
    desk.happens(ev.ModelFailed(A, "no memory"))
    key = desk.asks(B)
    desk.loaded(B)
    desk.ends(key)
    desk.ticks(10**6)
    assert desk.evicting == []


def test_a_long_run_counts_as_use_until_its_end() -> None:
    desk = a_desk()
    long = desk.asks(A)
    desk.uses(B)
    desk.ticks()
    desk.ends(long)
    desk.asks(C)
    assert desk.evicting == [B]


def test_a_model_that_is_asked_for_while_it_leaves_comes_back() -> None:
    desk = a_desk(budget=3 * GB)
    running = desk.asks(C)
    desk.loaded(C)
    desk.ends(running)
    desk.asks(D)
    assert desk.evicting == [A]
    key = desk.asks(A)
    assert desk.last(key).status is AttemptStatus.LOADING
    assert desk.evicting == [A, B]
    assert LoadModel(D) in desk.evicted(A)
    assert desk.evicted(B)[:1] == [LoadModel(A)]
    desk.loaded(A)
    assert desk.running[key] == A


def test_what_is_larger_than_it_was_reckoned_makes_more_room() -> None:
    desk = a_desk(budget=3 * GB)
    desk.asks(C)
    desk.loaded(C, 2 * GB)
    assert desk.evicting == []
    desk.asks(D)
    assert sorted(desk.evicting) == [A, B]


def test_more_goes_when_what_was_loading_turns_out_larger_than_it_was_reckoned() -> None:
    desk = AgentDesk([an_offer(A, GB), an_offer(B, GB), an_offer(C, GB), an_offer(D, 2 * GB)], 4 * GB)
    running = [desk.asks(name) for name in (A, B, C)]
    for name, key in zip((A, B, C), running, strict=True):
        if name != C:
            desk.loaded(name)
            desk.ends(key)
    waits = desk.asks(D)
    assert desk.evicting == [A]
    desk.loaded(C, 2 * GB)
    desk.evicted(A)
    assert desk.loading == [], "3 GB are taken, and 2 more are needed"
    assert desk.ticks()[-2:] == [EvictModel(B), SendAdvert()]
    desk.evicted(B)
    desk.loaded(D)
    assert desk.running[waits] == D


def test_a_host_that_dies_while_it_is_evicted_is_gone_once() -> None:
    desk = a_desk()
    desk.asks(C)
    desk.happens(ev.HostLost(A, "killed"))
    assert desk.states()[A] == "EVICTING"
    desk.evicted(A)
    assert desk.states()[A] == "LOADABLE"
    assert desk.loading == [C]


def test_a_failed_load_gives_its_memory_to_the_next() -> None:
    desk = AgentDesk([an_offer(A, GB), an_offer(B, GB)], GB)
    desk.asks(A)
    assert "m/a 1.00 GB (being loaded)" in desk.declined(B)
    desk.loading.clear()
    desk.happens(ev.ModelFailed(A, "no memory"))
    desk.asks(B)
    assert desk.loading == [B]


def test_no_more_goes_than_is_needed() -> None:
    residents = [
        Resident("small", 1, used_at_ms=1),
        Resident("large", 10, used_at_ms=2),
        Resident("other", 1, used_at_ms=3),
    ]
    assert plan_room(5, 12, residents).evict == ("large",)
    assert plan_room(1, 12, residents).evict == ("small",)
    assert plan_room(0, 12, residents).evict == ()
    assert plan_room(13, 12, residents).short_bytes == 1
    assert plan_room(13, 12, residents).evict == ()
    assert plan_room(13, 0, residents).fits


def test_what_can_never_fit_is_said_with_the_arithmetic() -> None:
    pinned = [Resident(A, GB), Resident(B, GB // 2)]
    assert never_fits(C, 3 * GB, 4 * GB, pinned, "ansbach") == (
        "m/c needs 3.00 GB; ansbach gives 4.00 GB to models, of which "
        "1.00 GB stay with m/a (pinned), 0.50 GB stay with m/b (pinned)."
    )
    assert never_fits(C, 5 * GB, 4 * GB, [], "ansbach") == "m/c needs 5.00 GB; ansbach gives 4.00 GB to models."
    assert never_fits(A, 3 * GB, 4 * GB, pinned, "ansbach") == ""


def test_an_eviction_names_its_reason() -> None:
    desk = a_desk()
    desk.asks(C)
    assert desk.offer(A).detail == "makes room for m/c"
    assert desk.offer(C).detail == "waiting for the memory of m/a"
    assert EvictModel(A) in desk.done


def test_whoever_waits_is_told_for_what() -> None:
    desk = a_desk()
    first = desk.asks(C)
    assert desk.last(first).detail == "m/c is being loaded: waiting for the memory of m/a"
    desk.evicted(A)
    desk.happens(ev.ModelProgressed(C, "loading weights, 42 % of 1.00 GB in memory"))
    assert desk.last(first).detail == "loading weights, 42 % of 1.00 GB in memory"
    second = desk.asks(C)
    assert desk.last(second).detail == "m/c is being loaded: loading weights, 42 % of 1.00 GB in memory"
