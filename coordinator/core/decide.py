"""The coordinator's one door: an event, the state and the time go in; what to record and what to send comes out."""

from __future__ import annotations

from typing import assert_never

from coordinator.core import attempts, jobs, keeping, sites
from coordinator.core.decision import Decision, Draft
from coordinator.core.events import (
    AdvertReceived,
    CancelRequested,
    DeletionAsked,
    Event,
    GrantAnswered,
    GrantUndelivered,
    JobAsked,
    JobPurged,
    JobsAsked,
    LinkLost,
    LinkReturned,
    MeshAsked,
    OrderReceived,
    SiteDisconnected,
    SiteReported,
    StoreMeasured,
    TermStarted,
    Ticked,
)
from coordinator.core.schedule import lease_end, schedule
from coordinator.core.state import Change, MeshState, drop_past, evolve
from edif_mesh.domain.ids import Epoch


def decide(event: Event, state: MeshState, now_ms: int) -> Decision:
    """Return what follows from `event`. Reads the state, changes nothing; `now_ms` is Unix time in ms.

    The caller records `decision.record` in one transaction, applies it with `apply`, and only then sends.
    """
    draft = Draft(state, now_ms)
    match event:
        case TermStarted(epoch):
            _start_term(draft, epoch)
        case OrderReceived():
            jobs.order_received(draft, event)
        case CancelRequested():
            jobs.cancel_requested(draft, event)
        case DeletionAsked():
            jobs.deletion_asked(draft, event)
        case JobPurged():
            keeping.job_purged(draft, event)
        case JobAsked():
            jobs.job_asked(draft, event)
        case JobsAsked():
            jobs.jobs_asked(draft, event)
        case MeshAsked():
            jobs.mesh_asked(draft, event)
        case AdvertReceived():
            sites.advert_received(draft, event)
            schedule(draft)
        case SiteReported():
            attempts.site_reported(draft, event)
            if event.report.status.terminal:
                schedule(draft)
        case GrantAnswered():
            attempts.grant_answered(draft, event)
        case GrantUndelivered():
            attempts.grant_undelivered(draft, event)
            schedule(draft)
        case SiteDisconnected():
            sites.site_disconnected(draft, event)
        case LinkLost() | LinkReturned() | StoreMeasured():
            pass
        case Ticked():
            _tick(draft)
        case _:
            assert_never(event)
    return draft.decision()


def apply(state: MeshState, event: Event, record: tuple[Change, ...], now_ms: int) -> None:
    """Bring the state in step with a recorded decision. The few facts about the coordinator's own ears are not recorded."""
    for change in record:
        evolve(state, change)
    match event:
        case LinkLost():
            state.link_lost_at_ms = now_ms if state.link_lost_at_ms is None else state.link_lost_at_ms
        case LinkReturned():
            state.link_lost_at_ms = None
            state.frozen_until_ms = now_ms + state.policy.suspect_ms
        case StoreMeasured(full):
            state.store_full = full
        case AdvertReceived() if state.sites and state.first_heard_at_ms is None:
            state.first_heard_at_ms = now_ms
        case TermStarted():
            state.frozen_until_ms = now_ms + state.policy.suspect_ms
            state.ticked_at_ms = now_ms
        case Ticked():
            jobs.drop_expired(state.expiries, now_ms)  # type: ignore[arg-type]
            drop_past(state, now_ms)
            if jobs.sites_are_known(state, now_ms):
                state.unjudged.clear()
            silent = sites.mass_silence(Draft(state, now_ms))
            state.frozen_since_ms = (state.frozen_since_ms or now_ms) if silent else None
            if _stood_still(state, now_ms):
                state.frozen_until_ms = now_ms + state.policy.suspect_ms
            state.ticked_at_ms = now_ms
        case _:
            pass


def is_frozen(state: MeshState, now_ms: int) -> bool:
    """Return whether silence proves nothing now: the own link is or was just down, or most sites fell silent together."""
    if state.link_lost_at_ms is not None or now_ms < state.frozen_until_ms:
        return True
    if _stood_still(state, now_ms):
        return True
    silent_for_ms = now_ms - state.frozen_since_ms if state.frozen_since_ms is not None else 0
    return silent_for_ms < state.policy.max_freeze_ms and sites.mass_silence(Draft(state, now_ms))


def _stood_still(state: MeshState, now_ms: int) -> bool:
    """Whether the coordinator was paused: what the sites said meanwhile may still wait to be heard."""
    return state.ticked_at_ms is not None and now_ms - state.ticked_at_ms >= state.policy.suspect_ms


def _start_term(draft: Draft, epoch: Epoch) -> None:
    """Take over: every lease runs anew from now, so that the coordinator's own absence costs no site its attempts."""
    draft.epoch = epoch
    for key in list(draft.state.active):
        attempt = draft.attempt(key)
        if attempt is not None:
            draft.change_attempt(
                attempt,
                deadline_at_ms=lease_end(draft.state.policy, draft.now_ms),
                sent_at_ms=0,
                missing=min(attempt.missing, 1),
            )


def _tick(draft: Draft) -> None:
    frozen = is_frozen(draft.state, draft.now_ms)
    jobs.expire_orders(draft)
    jobs.end_hopeless(draft)
    keeping.tend_deletions(draft)
    sites.tend_sites(draft, frozen=frozen)
    attempts.tend_attempts(draft, frozen=frozen)
    if draft.state.queue or draft.changed_jobs():
        schedule(draft)
