"""Admission over generated orders and grants: what starts fulfils every demand, and one broken demand is enough."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edif_mesh.domain.attempt import AttemptStatus, Blame, Receipt
from edif_mesh.domain.ids import AttemptNumber, BootId, Digest, Epoch, FederationId, JobId, SiteId
from edif_mesh.domain.job import Failure, Limits
from edif_mesh.domain.site import ModelOffer, ModelRef, ModelState, SiteStatus, Versions
from edif_mesh.wire.messages import AttemptLease, Audience, Grant, LeaseRenewed, Order, PayloadRef, Role, StopAttempt
from site_agent.core import events as ev
from site_agent.core.admission import SKEW_MS
from site_agent.core.changes import AttemptOpened, evolve
from site_agent.core.decision import decide
from site_agent.core.effects import Decision, KillAttempt, LoadModel, SendReport, StartAttempt
from site_agent.core.state import Model, Now, Policy, State

SITE, FEDERATION, GIB = SiteId("ansbach"), FederationId("fed"), 1 << 30
NOW = Now(1_800_000_000_000, 1_000_000)
JOB, DIGEST = JobId("j" + "0" * 23), Digest("a" * 64)


def a_state(**changes: Any) -> State:
    offer = ModelOffer("m/tiny", "c0ffee", "text-generation", "float32", ModelState.LOADED, 1, 1, aliases=("main",))
    policy = Policy(
        FEDERATION, SITE, "DE", slots=2, memory_bytes=8 * GIB, limits=Limits(cpu_ms=900_000), advert_ms=5_000
    )
    state = State(policy, BootId("b"), sandbox="base", epoch=Epoch(3), models={"m/tiny": Model(offer)})
    for name, value in changes.items():
        setattr(state, name, value)
    return state


def an_order(**changes: Any) -> Order:
    base = Order(
        FEDERATION, JOB, "n", NOW.wall_ms, NOW.wall_ms, NOW.wall_ms + 3_600_000, PayloadRef(Digest("0" * 64), 3),
        ModelRef("m/tiny"), Versions(),
    )  # fmt: skip
    return replace(base, **changes)


def a_grant(**changes: Any) -> Grant:
    return replace(
        Grant(DIGEST, JOB, SITE, AttemptNumber(1), Epoch(3), NOW.wall_ms, 30_000, NOW.wall_ms + 60_000), **changes
    )


def received(order: Order | None = None, grant: Grant | None = None, models: tuple[str, ...] = ()) -> ev.GrantReceived:
    return ev.GrantReceived(grant or a_grant(), order or an_order(), DIGEST, ev.Signer("ada", Role.RESEARCHER, models))


def apply(state: State, decision: Decision) -> Decision:
    for change in decision.record:
        evolve(state, change)
    return decision


def starts(decision: Decision) -> bool:
    return any(isinstance(effect, StartAttempt | LoadModel) for effect in decision.act) or any(
        isinstance(change, AttemptOpened) for change in decision.record
    )


def maybe(honest: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([honest, honest, honest, *others])


orders = st.builds(
    an_order,
    federation=maybe(FEDERATION, FederationId("other")),
    not_before_ms=maybe(NOW.wall_ms, NOW.wall_ms + SKEW_MS, NOW.wall_ms + SKEW_MS + 1),
    expires_at_ms=maybe(NOW.wall_ms + 9, NOW.wall_ms - SKEW_MS, NOW.wall_ms - SKEW_MS + 1, NOW.wall_ms + 10**10),
    model=st.builds(
        ModelRef,
        maybe("m/tiny", "m/other"),
        maybe(None, "c0ffee", "main", "dev"),
        maybe("text-generation", "x"),
        maybe(None, "float32", "float16"),
    ),
    audience=st.builds(Audience, maybe((), (SITE,), (SiteId("x"),)), maybe((), ("DE", "FR"), ("de",), ("FR",))),
    max_attempts=st.integers(-1, 5),
    sandbox=maybe("", "base", "namespaced", "x"),
    limits=st.builds(
        Limits,
        st.integers(-1, 700_000),
        st.integers(-1, 5 * GIB),
        st.integers(0, 9 * GIB),
        st.integers(0, 2 << 20),
        st.integers(-1, 10**6),
    ),
)
grants = st.builds(
    a_grant,
    order_digest=maybe(DIGEST, Digest("b" * 64)),
    job=maybe(JOB, JobId("j" + "1" * 23)),
    site=maybe(SITE, SiteId("heilbronn")),
    attempt=st.integers(-1, 6),
    epoch=st.integers(1, 5),
    lease_ms=maybe(30_000, 0, -1),
    expires_at_ms=maybe(NOW.wall_ms + 1, NOW.wall_ms - SKEW_MS, NOW.wall_ms - SKEW_MS + 1),
)


@given(orders, grants, st.sampled_from([(), ("m/tiny",), ("m/other",)]), st.booleans(), st.sampled_from(SiteStatus))
def test_what_starts_fulfils_every_demand(
    order: Order, grant: Grant, models: tuple[str, ...], seen: bool, status: SiteStatus
) -> None:
    state = a_state(status=status, seen={(DIGEST, grant.attempt): 1} if seen else {})
    decision = decide(received(order, grant, models), state, NOW)
    demands = [
        grant.order_digest == DIGEST,
        grant.job == order.job,
        grant.site == SITE,
        grant.epoch >= 3,
        1 <= grant.attempt <= order.max_attempts,
        grant.lease_ms > 0,
        grant.expires_at_ms > NOW.wall_ms - SKEW_MS,
        order.federation == FEDERATION,
        order.not_before_ms <= NOW.wall_ms + SKEW_MS,
        order.expires_at_ms > NOW.wall_ms - SKEW_MS,
        order.expires_at_ms - order.not_before_ms <= 7 * 86_400_000,
        order.sandbox in ("", "base"),
        not order.audience.sites or SITE in order.audience.sites,
        not order.audience.countries or "DE" in [code.upper() for code in order.audience.countries],
        order.model.repo_id == "m/tiny",
        order.model.revision in (None, "c0ffee", "main"),
        order.model.dtype in (None, "float32"),
        order.model.task == "text-generation",
        not models or order.model.repo_id in models,
        0 <= order.limits.wall_ms <= 600_000,
        0 <= order.limits.memory_bytes <= 4 * GIB,
        0 <= order.limits.result_bytes <= 8 * GIB,
        0 <= order.limits.log_bytes <= 1 << 20,
        0 <= order.limits.cpu_ms <= 900_000,
        not seen,
        status is SiteStatus.ACTIVE,
    ]
    assert starts(decision) == all(demands)
    if not all(demands):
        reports = [effect.report for effect in decision.act if isinstance(effect, SendReport)]
        assert (decision.refusal is not None) != bool(reports)
        assert all(report.status is AttemptStatus.DECLINED and report.failure for report in reports)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), max_size=30))
def test_no_pair_starts_twice_whatever_is_repeated_stopped_or_acknowledged(steps: list[tuple[int, int]]) -> None:
    state, started = a_state(), []
    for attempt, action in steps:
        grant = a_grant(attempt=AttemptNumber(attempt))
        if action == 2:
            stop = StopAttempt(JOB, AttemptNumber(attempt), SITE, Epoch(3), NOW.wall_ms, "cancelled")
            apply(state, decide(ev.StopReceived(stop), state, NOW))
            state.unsent.clear()
            continue
        decision = apply(state, decide(received(grant=grant), state, NOW))
        if starts(decision):
            started.append(attempt)
            if action == 1:
                apply(state, decide(ev.DrainRequested(), state, NOW))
                state.status = SiteStatus.ACTIVE
                state.unsent.clear()
    assert len(started) == len(set(started))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_the_epoch_never_falls(epochs: list[int]) -> None:
    state, highest = a_state(epoch=Epoch(0)), 0
    for number, epoch in enumerate(epochs, 1):
        grant = a_grant(epoch=Epoch(epoch), order_digest=Digest(f"{number:064x}"))
        event = replace(received(grant=grant), digest=grant.order_digest)
        apply(state, decide(event, state, NOW))
        highest = max(highest, epoch)
        assert state.epoch == highest


@given(st.lists(st.integers(0, 3 * GIB), max_size=12))
def test_slots_and_memory_are_never_exceeded(asks: list[int]) -> None:
    state = a_state()
    for number, memory in enumerate(asks, 1):
        job, digest = JobId(f"j{number:023x}"), Digest(f"{number:064x}")
        order = an_order(job=job, limits=Limits(memory_bytes=memory))
        grant = a_grant(job=job, order_digest=digest)
        apply(state, decide(replace(received(order, grant), digest=digest), state, NOW))
        assert len(state.held) <= state.policy.slots
        assert sum(held.order.limits.memory_bytes for held in state.held.values()) <= state.policy.memory_bytes


def a_renewal(sequence: int, *named: AttemptNumber, epoch: int = 3) -> LeaseRenewed:
    leases = tuple(AttemptLease(JOB, attempt) for attempt in named)
    return LeaseRenewed(SITE, Epoch(epoch), sequence, NOW.wall_ms, 30_000, leases)


def a_running_state() -> State:
    state = a_state(advert_sequence=10)
    apply(state, decide(received(), state, NOW))
    apply(state, decide(ev.AdvertDue(), state, NOW))
    return state


def runner_gone(state: State, receipt: Receipt | None = None) -> Decision:
    """The runner of the only attempt, which is being stopped, is gone."""
    return apply(state, decide(ev.AttemptStopped((JOB, AttemptNumber(1)), receipt), state, NOW))


def test_a_stopped_attempt_keeps_its_slot_and_says_nothing_until_its_runner_is_gone() -> None:
    state, key = a_running_state(), (JOB, AttemptNumber(1))
    stop = ev.StopReceived(StopAttempt(*key, SITE, Epoch(3), NOW.wall_ms, "cancelled"))
    assert apply(state, decide(stop, state, NOW)).act == (KillAttempt(key, "cancelled"),)
    late = Now(NOW.wall_ms, NOW.monotonic_ms + 10**6)
    for event in (stop, ev.AttemptStarted(key), ev.DrainRequested(), ev.Ticked()):
        assert not [e for e in apply(state, decide(event, state, late)).act if isinstance(e, KillAttempt | SendReport)]
    assert state.free_slots == 1
    (report,) = [e.report for e in runner_gone(state, Receipt(wall_ms=7)).act if isinstance(e, SendReport)]
    assert (report.status, report.detail, report.receipt) == (AttemptStatus.CANCELLED, "cancelled", Receipt(wall_ms=7))
    assert state.free_slots == 2
    assert runner_gone(state) == Decision()


@pytest.mark.parametrize("last", ["succeeded", "failed"])
def test_a_word_that_crosses_the_stop_does_not_change_what_is_reported(last: str) -> None:
    state, key = a_running_state(), (JOB, AttemptNumber(1))
    apply(state, decide(ev.StopReceived(StopAttempt(*key, SITE, Epoch(3), 0, "expired")), state, NOW))
    words = {
        "succeeded": ev.AttemptSucceeded(key, "manifest", Receipt(wall_ms=9)),
        "failed": ev.AttemptFailed(key, Failure("user_error", "x"), Blame.USER, Receipt(wall_ms=9)),
    }
    (report,) = [e.report for e in decide(words[last], state, NOW).act if isinstance(e, SendReport)]
    assert (report.status, report.manifest, report.failure) == (AttemptStatus.CANCELLED, None, None)
    assert report.receipt == Receipt(wall_ms=9)


def test_an_answer_to_an_advert_from_before_the_grant_does_not_stop_it() -> None:
    state = a_running_state()
    apply(state, decide(ev.LeaseAnswered(a_renewal(10), NOW.monotonic_ms), state, NOW))
    assert (JOB, 1) in state.held


def test_an_answer_to_a_later_advert_that_does_not_name_it_stops_it() -> None:
    state = a_running_state()
    decision = apply(state, decide(ev.LeaseAnswered(a_renewal(11), NOW.monotonic_ms), state, NOW))
    assert KillAttempt((JOB, AttemptNumber(1)), "superseded") in decision.act
    runner_gone(state)
    assert state.held == {}


@pytest.mark.parametrize(("sequence", "epoch"), [(12, 3), (11, 2)])
def test_an_answer_to_no_advert_of_ours_or_of_an_old_epoch_extends_nothing(sequence: int, epoch: int) -> None:
    state = a_running_state()
    late = Now(NOW.wall_ms, NOW.monotonic_ms + 29_000)
    renewal = a_renewal(sequence, AttemptNumber(1), epoch=epoch)
    apply(state, decide(ev.LeaseAnswered(renewal, late.monotonic_ms), state, late))
    end = Now(NOW.wall_ms, NOW.monotonic_ms + 30_000)
    apply(state, decide(ev.Ticked(), state, end))
    runner_gone(state)
    assert state.held == {}


def test_a_lease_counts_from_the_advert_and_not_from_its_answer() -> None:
    state = a_running_state()
    sent, answered = NOW.monotonic_ms + 5_000, Now(NOW.wall_ms, NOW.monotonic_ms + 25_000)
    apply(state, decide(ev.LeaseAnswered(a_renewal(11, AttemptNumber(1)), sent), state, answered))
    apply(state, decide(ev.Ticked(), state, Now(NOW.wall_ms, sent + 29_999)))
    runner_gone(state)
    assert state.held
    apply(state, decide(ev.Ticked(), state, Now(NOW.wall_ms, sent + 30_000)))
    runner_gone(state)
    assert not state.held


def test_a_computed_result_outlives_the_lease() -> None:
    state = a_running_state()
    apply(state, decide(ev.AttemptComputed((JOB, AttemptNumber(1))), state, NOW))
    assert state.free_slots == 2
    apply(state, decide(ev.Ticked(), state, Now(NOW.wall_ms, NOW.monotonic_ms + 10**6)))
    assert state.held
