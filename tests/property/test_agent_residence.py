"""Whatever is asked for, fails and dies at a site: its models never take more than its budget, and who must stay stays."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.room import Resident, plan_room
from edif_mesh.domain.site import ModelState
from site_agent.core import events as ev
from site_agent.core.effects import EvictModel, LoadModel
from tests.builders_agent import AgentDesk, an_offer

BUDGET, RESIDENCY_MS = 10, 2_000
steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "end", "load", "load", "evict", "evict", "fail", "die", "pass", "pass"]),
        st.integers(0, 9),
    ),
    max_size=60,
)


def take(desk: AgentDesk, what: str, number: int) -> list[Any]:
    """Have one thing happen, if it can; `number` chooses to whom. Returns the effects."""
    before = len(desk.done)
    names = sorted(desk.state.models)
    loaded = [name for name in names if desk.offer(name).state is ModelState.LOADED]
    if what == "ask":
        desk.asks(names[number % len(names)])
    elif what == "end" and desk.running:
        desk.ends(sorted(desk.running)[number % len(desk.running)])
    elif what == "load" and desk.loading:
        desk.loaded(desk.loading[number % len(desk.loading)])
    elif what == "evict" and desk.evicting:
        desk.evicted(desk.evicting[number % len(desk.evicting)])
    elif what == "fail" and desk.loading:
        desk.happens(ev.ModelFailed(desk.loading.pop(number % len(desk.loading)), "it broke"))
    elif what == "die" and loaded:
        gone = loaded[number % len(loaded)]
        desk.happens(ev.HostLost(gone, "killed"))
        for key in [key for key, held in desk.state.held.items() if held.order.model.repo_id == gone]:
            desk.happens(ev.AttemptStopped(key))
    elif what == "pass":
        desk.ticks(100 + 300 * number)
    return desk.done[before:]


@given(st.lists(st.integers(1, 7), min_size=2, max_size=5), st.integers(0, 1), steps)
@settings(max_examples=150, deadline=None)
def test_the_budget_holds_and_who_must_stay_stays(
    sizes: list[int], pins: int, happenings: list[tuple[str, int]]
) -> None:
    offers = [an_offer(f"m/{n}", size, pinned=n < pins) for n, size in enumerate(sizes)]
    desk = AgentDesk(offers, BUDGET, RESIDENCY_MS, preload=("m/1",))
    size = {offer.repo_id: offer.memory_bytes for offer in offers}
    live: set[str] = set()
    for what, number in happenings:
        before = {name: (model.stays_until_ms, model.offer.pinned) for name, model in desk.state.models.items()}
        for effect in take(desk, what, number):
            if isinstance(effect, EvictModel):
                until, pinned = before[effect.repo_id]
                assert not pinned
                assert until <= desk.now.monotonic_ms
                assert effect.repo_id not in desk.running.values()
        live = {n for n in size if desk.offer(n).state in (ModelState.LOADED, ModelState.EVICTING)} | set(desk.loading)
        assert sum(size[name] for name in live) <= BUDGET
    for _ in range(8):  # once nothing fails any more, nobody waits for ever
        for name in list(desk.evicting):
            desk.evicted(name)
        for name in list(desk.loading):
            desk.loaded(name)
        for key in list(desk.running):
            desk.ends(key)
        desk.ticks(70_000)
    assert not desk.state.held
    assert all(report.status.terminal for report in desk.reports[-1:])
    if pins:
        assert desk.offer("m/0").state is ModelState.LOADED


residents = st.lists(
    st.builds(Resident, st.uuids().map(str), st.integers(1, 9), st.sampled_from(["", "", "in use"]), st.integers(0, 5)),
    max_size=7,
)


@given(st.integers(0, 30), st.integers(1, 30), residents)
def test_a_plan_frees_enough_with_nothing_to_spare(need: int, budget: int, there: list[Resident]) -> None:
    plan = plan_room(need, budget, there)
    taken, size = sum(item.memory_bytes for item in there), {item.repo_id: item.memory_bytes for item in there}
    could_go = sum(item.memory_bytes for item in there if not item.kept)
    assert plan.fits == (need + taken - could_go <= budget)
    if not plan.fits:
        assert plan.evict == ()
        assert plan.short_bytes == need + taken - could_go - budget
        return
    after = need + taken - plan.evicted_bytes
    assert after <= budget or taken + need <= budget
    assert plan.evicted_bytes == sum(size[name] for name in plan.evict)
    assert all(after + size[name] > budget for name in plan.evict), "one of them could have stayed"
    assert not {item.repo_id for item in there if item.kept} & set(plan.evict)


@given(st.lists(st.sampled_from(["m/0", "m/1", "m/2", "m/3"]), min_size=1, max_size=12))
def test_whoever_is_asked_for_gets_loaded_when_nobody_is_in_the_way(asked: list[str]) -> None:
    desk = AgentDesk([an_offer(f"m/{n}", 4) for n in range(4)], 8)
    for name in asked:
        key = desk.asks(name)
        for gone in list(desk.evicting):
            desk.evicted(gone)
        if name in desk.loading:
            desk.loaded(name)
        desk.ends(key)
        assert desk.last(key).status is AttemptStatus.SUCCEEDED
        desk.ticks()
    assert next(e.repo_id for e in desk.done if isinstance(e, LoadModel)) == asked[0]
