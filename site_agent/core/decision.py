"""The one door of the core: an event and the state in, what to record and what to do out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import assert_never

from edif_mesh.domain.attempt import AttemptStatus, Blame
from edif_mesh.domain.ids import Digest, Epoch
from edif_mesh.domain.job import Failure
from edif_mesh.domain.site import ModelState, SiteStatus
from edif_mesh.wire.messages import Grant, LeaseRenewed, Report, ReportReceived, StopAttempt
from site_agent.core import events as ev
from site_agent.core import models
from site_agent.core.admission import MAX_WINDOW_MS, SKEW_MS, decline, refuse_bundle, refuse_replay
from site_agent.core.attempts import bare_report, computed, end, payload_refused, progress, report_of, stopped
from site_agent.core.changes import (
    AdvertAnswered,
    AdvertNumbered,
    AttemptBarred,
    AttemptEnded,
    AttemptOpened,
    Audited,
    Change,
    EpochRaised,
    HeldChanged,
    JobsDropped,
    ModelChanged,
    ModelUsed,
    OldForgotten,
    PairSeen,
    Reported,
    ReportSettled,
    StatusChanged,
)
from site_agent.core.effects import Decision, DropJobs, DropResult, Effect, SendAdvert, SendReport, StartAttempt
from site_agent.core.state import AttemptKey, Held, Model, Now, State

RESTART_GAP = 1_000
"""How far the sequence jumps at a restart: reports of progress are not journaled, and must not be newer."""


def decide(event: ev.Event, state: State, now: Now) -> Decision:
    """Return what `event` changes and causes. Pure: reads `state`, changes nothing."""
    match event:
        case ev.GrantReceived() | ev.BadOrderReceived():
            return _grant(event, state, now)
        case ev.Distrusted(failure, detail):
            return Decision((Audited(f"refused: {failure.code}", f"{failure.text} {detail}"),), refusal=failure)
        case ev.StopReceived(stop):
            return _stop(stop, state, now)
        case ev.LeaseAnswered(renewal, sent_monotonic_ms):
            return _renew(renewal, sent_monotonic_ms, state, now)
        case ev.AttemptStarted(key):
            return progress(state, key, AttemptStatus.RUNNING, now)
        case ev.AttemptComputed(key):
            return computed(state, key, now)
        case ev.AttemptSucceeded(key, manifest, receipt):
            return end(state, key, AttemptStatus.SUCCEEDED, now, manifest=manifest, receipt=receipt)
        case ev.AttemptFailed(key, failure, blame, receipt):
            return end(state, key, AttemptStatus.FAILED, now, failure=failure, blame=blame, receipt=receipt)
        case ev.AttemptStopped(key, receipt):
            return stopped(state, key, receipt, now)
        case ev.PayloadRefused(key, failure):
            return payload_refused(state, key, failure, now)
        case ev.ModelProgressed(repo_id, detail):
            return models.progressed(state, repo_id, detail, now)
        case ev.ModelLoaded(offer):
            return models.loaded(offer, state, now)
        case ev.ModelFailed(repo_id, text):
            return models.failed(state, repo_id, text, now)
        case ev.ModelEvicted(repo_id):
            return models.evicted(state, repo_id)
        case ev.HostLost(repo_id, text):
            return models.host_lost(state, repo_id, text, now)
        case ev.ReportAcknowledged(received):
            return _acknowledged(state, received)
        case ev.AdvertDue():
            return Decision((AdvertNumbered(state.advert_sequence + 1),))
        case ev.DrainRequested():
            return _drain(state, now)
        case ev.Restarted(orphans):
            return _restarted(state, orphans, now)
        case ev.Ticked(forget):
            return _tick(state, now, forget)
        case _:
            assert_never(event)


# --------------------------------------------------------------------------------------- grants and stops


def _grant(event: ev.GrantReceived | ev.BadOrderReceived, state: State, now: Now) -> Decision:
    grant = event.grant
    refusal = refuse_bundle(grant, event.digest, state)
    key = (grant.job, grant.attempt)
    if refusal is None and (key in state.held or key in state.unsent):
        return _repeated(grant, state)
    refusal = refusal or refuse_replay(grant, state)
    if refusal is not None:
        return Decision((_refused(key, refusal),), refusal=refusal)
    failure = event.failure if isinstance(event, ev.BadOrderReceived) else decline(event, state, now)
    if failure is not None:
        return _declined(event, failure, state, now)
    assert isinstance(event, ev.GrantReceived)
    return _accepted(event, state, now)


def _repeated(grant: Grant, state: State) -> Decision:
    """A grant of what is held or reported already starts nothing and extends no lease; a new term counts."""
    record = list(_raised(grant.epoch, state))
    held = state.held.get((grant.job, grant.attempt))
    if held is not None and held.digest == grant.order_digest and grant.epoch > held.epoch:
        record.append(HeldChanged(replace(held, epoch=grant.epoch)))
    return Decision(tuple(record))


def _declined(event: ev.GrantReceived | ev.BadOrderReceived, failure: Failure, state: State, now: Now) -> Decision:
    grant = event.grant
    expires = event.order.expires_at_ms if isinstance(event, ev.GrantReceived) else 0
    report = Report(
        site=state.policy.site,
        boot=state.boot,
        job=grant.job,
        attempt=grant.attempt,
        sequence=1,
        status=AttemptStatus.DECLINED,
        issued_at_ms=now.wall_ms,
        order_digest=grant.order_digest,
        detail=failure.text,
        failure=failure,
        epoch=grant.epoch,
    )
    record: tuple[Change, ...] = (
        *_raised(grant.epoch, state),
        PairSeen((grant.order_digest, grant.attempt), _until(grant.expires_at_ms, expires, now)),
        AttemptEnded(report),
        _refused((grant.job, grant.attempt), failure),
    )
    return Decision(record, (SendReport(report),))


def _accepted(event: ev.GrantReceived, state: State, now: Now) -> Decision:
    grant, order = event.grant, event.order
    model = state.models[order.model.repo_id]
    held = Held(
        job=grant.job,
        attempt=grant.attempt,
        digest=event.digest,
        order=order,
        epoch=grant.epoch,
        lease_until_ms=now.monotonic_ms + grant.lease_ms,
        after_advert=state.advert_sequence,
        started=model.loaded,
        owner=event.signer.key,
    )
    record: list[Change] = [
        *_raised(grant.epoch, state),
        PairSeen((event.digest, grant.attempt), _until(grant.expires_at_ms, order.expires_at_ms, now)),
        Audited("accepted", f"{grant.job} attempt {grant.attempt}, signed by {event.signer.name}"),
    ]
    if model.loaded:
        record += [AttemptOpened(held), ModelUsed(order.model.repo_id, now)]
        return Decision(tuple(record), (StartAttempt(held), SendAdvert()))
    on_its_way = model.queued or model.offer.state is ModelState.LOADING
    begun = Decision() if on_its_way else models.load(order.model.repo_id, state, now)
    report = report_of(held, AttemptStatus.LOADING, state, now, detail=_how_far(model, begun))
    waiting = replace(held, status=AttemptStatus.LOADING, sequence=report.sequence)
    record += [AttemptOpened(waiting), Reported(report), *begun.record]
    return Decision(tuple(record), (SendReport(report), SendAdvert(), *begun.act))


def _how_far(model: Model, begun: Decision) -> str:
    """Say where the loading stands with which `begun` begins, or that goes on already."""
    name = model.offer.repo_id
    now = [c.model for c in begun.record if isinstance(c, ModelChanged) and c.model.offer.repo_id == name]
    detail = (now or [model])[-1].offer.detail
    return f"{name} is being loaded" + (f": {detail}" if detail else "")


def _stop(stop: StopAttempt, state: State, now: Now) -> Decision:
    key = (stop.job, stop.attempt)
    if stop.site != state.policy.site:
        return Decision(refusal=Failure("wrong_site", f"This is {state.policy.site}, not {stop.site}."))
    if stop.epoch < state.epoch:
        return Decision(refusal=Failure("stale_epoch", f"A coordinator of epoch {state.epoch} has taken over."))
    raised = _raised(stop.epoch, state)
    if key in state.held:
        ended = end(state, key, AttemptStatus.CANCELLED, now, detail=stop.reason, kill=stop.reason)
        return Decision((*raised, *ended.record), ended.act)
    if key in state.unsent:
        return Decision(raised)
    report = bare_report(state, key, Digest(""), stop.epoch, 1, now, AttemptStatus.CANCELLED, detail=stop.reason)
    bar = AttemptBarred(key, now.wall_ms + MAX_WINDOW_MS + 2 * SKEW_MS)
    return Decision((*raised, bar, AttemptEnded(report)), (SendReport(report),))


# --------------------------------------------------------------------------------------- leases


def _renew(renewal: LeaseRenewed, sent_monotonic_ms: int, state: State, now: Now) -> Decision:
    known = state.renewed_sequence < renewal.advert_sequence <= state.advert_sequence
    if renewal.site != state.policy.site or renewal.epoch < state.epoch or not known:
        return Decision()
    named = {(lease.job, lease.attempt) for lease in renewal.attempts}
    record: list[Change] = [*_raised(renewal.epoch, state), AdvertAnswered(renewal.advert_sequence)]
    act: list[Effect] = []
    for held in list(state.held.values()):
        if held.key in named:
            until = sent_monotonic_ms + renewal.lease_ms
            record.append(HeldChanged(replace(held, lease_until_ms=max(until, held.lease_until_ms))))
        elif held.after_advert < renewal.advert_sequence:
            ended = end(state, held.key, AttemptStatus.CANCELLED, now, detail="superseded", kill="superseded")
            record += ended.record
            act += ended.act
    running = {held.job for held in state.held.values()}  # what has not ended here may still store something
    drop = tuple(job for job in renewal.drop if job not in running)
    if fresh := tuple(job for job in drop if job not in state.dropped):
        record.append(Audited("dropped", f"deleted by their owners: {', '.join(fresh)}"))
        act += [DropJobs(fresh), SendAdvert()]
    if drop != state.dropped:
        record.append(JobsDropped(drop))
    return Decision(tuple(record), tuple(act))


def _tick(state: State, now: Now, forget: bool) -> Decision:
    record: list[Change] = []
    act: list[Effect] = []
    failure = Failure("lease_ended", "The lease ended without a word of the coordinator; another site may run it now.")
    for held in state.computing:
        if held.lease_until_ms <= now.monotonic_ms:
            ended = end(
                state, held.key, AttemptStatus.FAILED, now, failure=failure, blame=Blame.SITE, kill="lease_ended"
            )
            record += ended.record
            act += ended.act
    tended = models.tend_models(state, now)
    record += tended.record
    act += tended.act
    if forget:
        record.append(OldForgotten(now.wall_ms))
    return Decision(tuple(record), tuple(act))


def _acknowledged(state: State, received: ReportReceived) -> Decision:
    if received.site != state.policy.site or received.epoch < state.epoch:
        return Decision()
    key = (received.job, received.attempt)
    raised = _raised(received.epoch, state)
    waiting = state.unsent.get(key)
    if waiting is None or waiting > received.sequence:
        return Decision(raised)
    drop: tuple[Effect, ...] = () if key in state.held else (DropResult(key),)
    return Decision((*raised, ReportSettled(key, received.sequence)), drop)


def _drain(state: State, now: Now) -> Decision:
    record: list[Change] = [StatusChanged(SiteStatus.DRAINING)]
    act: list[Effect] = []
    for held in state.computing:
        ended = end(state, held.key, AttemptStatus.RELEASED, now, detail="The site is being drained.", kill="draining")
        record += ended.record
        act += ended.act
    return Decision(tuple(record), (*act, SendAdvert()))


def _restarted(state: State, orphans: Iterable[ev.Orphan], now: Now) -> Decision:
    failure = Failure("agent_restarted", "The agent of the site died and started again; this attempt was lost with it.")
    reports = [
        bare_report(
            state,
            orphan.key,
            orphan.digest,
            orphan.epoch,
            orphan.sequence + RESTART_GAP,
            now,
            AttemptStatus.FAILED,
            detail=failure.text,
            failure=failure,
        )
        for orphan in orphans
    ]
    ended: list[Change] = [AttemptEnded(report) for report in reports]
    return Decision(tuple(ended), tuple(SendReport(report) for report in reports))


# --------------------------------------------------------------------------------------- pieces


def _raised(epoch: Epoch, state: State) -> tuple[Change, ...]:
    return (EpochRaised(epoch),) if epoch > state.epoch else ()


def _refused(key: AttemptKey, failure: Failure) -> Audited:
    return Audited(f"refused: {failure.code}", f"{key[0][:40]} attempt {key[1]}: {failure.text}")


def _until(grant_ms: int, order_ms: int, now: Now) -> int:
    """Return how long a pair must be remembered: while its grant or its order could still start something.

    An order that was not believed has no readable expiry; it is remembered for the longest window there is.
    """
    most = now.wall_ms + MAX_WINDOW_MS + 2 * SKEW_MS
    return min(max(grant_ms, order_ms) + 2 * SKEW_MS, most) if order_ms else most
