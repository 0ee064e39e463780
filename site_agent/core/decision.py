"""The one door of the core: an event and the state in, what to record and what to do out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import assert_never

from edif_mesh.domain.attempt import AttemptStatus, Blame, Receipt
from edif_mesh.domain.ids import AttemptNumber, Digest, Epoch, JobId
from edif_mesh.domain.job import Failure
from edif_mesh.domain.site import ModelState, SiteStatus
from edif_mesh.wire.messages import Grant, LeaseRenewed, Report, ReportReceived, StopAttempt
from site_agent.core import events as ev
from site_agent.core.admission import MAX_WINDOW_MS, SKEW_MS, decline, refuse_bundle, refuse_replay
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
    ModelChanged,
    OldForgotten,
    PairSeen,
    Reported,
    ReportSettled,
    StatusChanged,
)
from site_agent.core.state import AttemptKey, Ending, Held, Model, Now, State

RESTART_GAP = 1_000
"""How far the sequence jumps at a restart: reports of progress are not journaled, and must not be newer."""
MAX_BACKOFF_MS = 60_000


@dataclass(frozen=True, slots=True)
class StartAttempt:
    """Run it: fetch the payload, lend a runner of the loaded model."""

    held: Held


@dataclass(frozen=True, slots=True)
class KillAttempt:
    """End its runner, now; its last report is already on the way."""

    key: AttemptKey
    reason: str


@dataclass(frozen=True, slots=True)
class SendReport:
    """Send it until it is acknowledged."""

    report: Report


@dataclass(frozen=True, slots=True)
class LoadModel:
    """Start a host."""

    repo_id: str


@dataclass(frozen=True, slots=True)
class SendAdvert:
    """Tell the coordinator at once."""


@dataclass(frozen=True, slots=True)
class DropResult:
    """The coordinator has this attempt's last report: what is kept of its result here may go."""

    key: AttemptKey


Effect = StartAttempt | KillAttempt | SendReport | LoadModel | SendAdvert | DropResult


@dataclass(frozen=True, slots=True)
class Decision:
    """Record first, then act. `refusal` is the answer to whoever asked; None means `Received`."""

    record: tuple[Change, ...] = ()
    act: tuple[Effect, ...] = ()
    refusal: Failure | None = None


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
            return _progress(state, key, AttemptStatus.RUNNING, now)
        case ev.AttemptComputed(key):
            return _computed(state, key)
        case ev.AttemptSucceeded(key, manifest, receipt):
            return _end(state, key, AttemptStatus.SUCCEEDED, now, manifest=manifest, receipt=receipt)
        case ev.AttemptFailed(key, failure, blame, receipt):
            return _end(state, key, AttemptStatus.FAILED, now, failure=failure, blame=blame, receipt=receipt)
        case ev.AttemptStopped(key, receipt):
            return _stopped(state, key, receipt, now)
        case ev.PayloadRefused(key, failure):
            return _payload_refused(state, key, failure, now)
        case ev.ModelProgressed(repo_id, detail):
            return _model_progressed(state, repo_id, detail, now)
        case ev.ModelLoaded():
            return _model_loaded(event, state, now)
        case ev.ModelFailed(repo_id, text):
            return _model_failed(state, repo_id, text, now)
        case ev.HostLost(repo_id, text):
            return _host_lost(state, repo_id, text, now)
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
    )
    record: list[Change] = [
        *_raised(grant.epoch, state),
        PairSeen((event.digest, grant.attempt), _until(grant.expires_at_ms, order.expires_at_ms, now)),
        Audited("accepted", f"{grant.job} attempt {grant.attempt}, signed by {event.signer.name}"),
    ]
    if model.loaded:
        return Decision((*record, AttemptOpened(held)), (StartAttempt(held), SendAdvert()))
    report = _report(held, AttemptStatus.LOADING, state, now, detail=f"{order.model.repo_id} is being loaded.")
    waiting = replace(held, status=AttemptStatus.LOADING, sequence=report.sequence)
    record += [AttemptOpened(waiting), Reported(report)]
    act: list[Effect] = [SendReport(report), SendAdvert()]
    if model.offer.state is ModelState.LOADABLE:
        record.append(_loading(model))
        act.append(LoadModel(order.model.repo_id))
    return Decision(tuple(record), tuple(act))


def _stop(stop: StopAttempt, state: State, now: Now) -> Decision:
    key = (stop.job, stop.attempt)
    if stop.site != state.policy.site:
        return Decision(refusal=Failure("wrong_site", f"This is {state.policy.site}, not {stop.site}."))
    if stop.epoch < state.epoch:
        return Decision(refusal=Failure("stale_epoch", f"A coordinator of epoch {state.epoch} has taken over."))
    raised = _raised(stop.epoch, state)
    if key in state.held:
        ended = _end(state, key, AttemptStatus.CANCELLED, now, detail=stop.reason, kill=stop.reason)
        return Decision((*raised, *ended.record), ended.act)
    if key in state.unsent:
        return Decision(raised)
    report = _bare_report(state, key, Digest(""), stop.epoch, 1, now, AttemptStatus.CANCELLED, detail=stop.reason)
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
            ended = _end(state, held.key, AttemptStatus.CANCELLED, now, detail="superseded", kill="superseded")
            record += ended.record
            act += ended.act
    return Decision(tuple(record), tuple(act))


def _tick(state: State, now: Now, forget: bool) -> Decision:
    record: list[Change] = []
    act: list[Effect] = []
    failure = Failure("lease_ended", "The lease ended without a word of the coordinator; another site may run it now.")
    for held in state.computing:
        if held.lease_until_ms <= now.monotonic_ms:
            ended = _end(
                state, held.key, AttemptStatus.FAILED, now, failure=failure, blame=Blame.SITE, kill="lease_ended"
            )
            record += ended.record
            act += ended.act
    for model in state.models.values():
        if model.offer.state in (ModelState.LOADABLE, ModelState.FAILED) and model.retry_at_ms <= now.monotonic_ms:
            retried = _retry(model, state)
            record += retried.record
            act += retried.act
    if forget:
        record.append(OldForgotten(now.wall_ms))
    return Decision(tuple(record), tuple(act))


# --------------------------------------------------------------------------------------- attempts


def _progress(state: State, key: AttemptKey, status: AttemptStatus, now: Now, detail: str = "") -> Decision:
    held = state.held.get(key)
    if held is None or held.ending is not None:
        return Decision()
    report = _report(held, status, state, now, detail=detail)
    return Decision((Reported(report),), (SendReport(report),))


def _computed(state: State, key: AttemptKey) -> Decision:
    held = state.held.get(key)
    if held is None:
        return Decision()
    record: list[Change] = [HeldChanged(replace(held, computed=True))]
    model = state.models.get(held.order.model.repo_id)
    if model is not None and model.failures:
        record.append(ModelChanged(replace(model, failures=0)))
    return Decision(tuple(record), (SendAdvert(),))


def _payload_refused(state: State, key: AttemptKey, failure: Failure, now: Now) -> Decision:
    held = state.held.get(key)
    if held is not None and held.status is AttemptStatus.ACCEPTED:
        return _end(state, key, AttemptStatus.DECLINED, now, failure=failure, detail=failure.text)
    return _end(state, key, AttemptStatus.FAILED, now, failure=failure, blame=Blame.SITE)


def _end(
    state: State,
    key: AttemptKey,
    status: AttemptStatus,
    now: Now,
    *,
    detail: str = "",
    failure: Failure | None = None,
    blame: Blame | None = None,
    receipt: Receipt | None = None,
    manifest: str | None = None,
    kill: str = "",
) -> Decision:
    """Return the decision that ends a held attempt with its last report; empty when it is held no longer.

    With `kill`, what runs is stopped first: `AttemptStopped` follows when its runner is gone, and only then the report.
    """
    held = state.held.get(key)
    if held is None:
        return Decision()
    if kill and held.ending is not None:
        return Decision()
    if kill and held.started:
        stopping = replace(held, ending=Ending(status, detail, failure, blame))
        return Decision((HeldChanged(stopping),), (KillAttempt(key, kill),))
    said = held.ending or Ending(status, detail, failure, blame)
    status, failure = said.status, said.failure
    report = replace(
        _report(held, status, state, now, detail=said.detail),
        failure=failure,
        blame=said.blame,
        receipt=receipt,
        manifest=manifest if status is AttemptStatus.SUCCEEDED else None,
    )
    advert: tuple[Effect, ...] = () if held.computed else (SendAdvert(),)
    why = f"{held.job} attempt {held.attempt} {status}" + (f": {failure.code}" if failure else "")
    return Decision((AttemptEnded(report), Audited("ended", why)), (SendReport(report), *advert))


def _stopped(state: State, key: AttemptKey, receipt: Receipt | None, now: Now) -> Decision:
    held = state.held.get(key)
    if held is None or held.ending is None:
        return Decision()
    return _end(state, key, held.ending.status, now, receipt=receipt)


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
        ended = _end(state, held.key, AttemptStatus.RELEASED, now, detail="The site is being drained.", kill="draining")
        record += ended.record
        act += ended.act
    return Decision(tuple(record), (*act, SendAdvert()))


def _restarted(state: State, orphans: Iterable[ev.Orphan], now: Now) -> Decision:
    failure = Failure("agent_restarted", "The agent of the site died and started again; this attempt was lost with it.")
    reports = [
        _bare_report(
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


# --------------------------------------------------------------------------------------- models


def _model_progressed(state: State, repo_id: str, detail: str, now: Now) -> Decision:
    model = state.models[repo_id]
    if model.offer.detail == detail:
        return Decision()
    record: list[Change] = [ModelChanged(replace(model, offer=replace(model.offer, detail=detail)))]
    act: list[Effect] = []
    for held in _waiting(state, repo_id):
        told = _progress(state, held.key, AttemptStatus.LOADING, now, detail)
        record += told.record
        act += told.act
    return Decision(tuple(record), tuple(act))


def _model_loaded(event: ev.ModelLoaded, state: State, now: Now) -> Decision:
    model = state.models[event.offer.repo_id]
    record: list[Change] = [ModelChanged(replace(model, offer=event.offer))]
    act: list[Effect] = []
    for held in _waiting(state, event.offer.repo_id):
        if now.wall_ms >= held.order.expires_at_ms + SKEW_MS:
            late = Failure("order_expired", "The order expired while its model was being loaded.")
            ended = _end(state, held.key, AttemptStatus.RELEASED, now, failure=late, detail=late.text)
            record += ended.record
            act += ended.act
        else:
            ready = replace(held, started=True, load_ms=event.offer.load_ms)
            record.append(HeldChanged(ready))
            act.append(StartAttempt(ready))
    return Decision(tuple(record), (*act, SendAdvert()))


def _model_failed(state: State, repo_id: str, text: str, now: Now) -> Decision:
    model = state.models[repo_id]
    record: list[Change] = [_failed(model, text, ModelState.FAILED, now)]
    act: list[Effect] = [SendAdvert()]
    failure = Failure("load_failed", f"{repo_id} could not be loaded: {text}")
    for held in _waiting(state, repo_id):
        ended = _end(state, held.key, AttemptStatus.FAILED, now, failure=failure, blame=Blame.SITE)
        record += ended.record
        act += ended.act
    return Decision(tuple(record), tuple(act))


def _host_lost(state: State, repo_id: str, text: str, now: Now) -> Decision:
    model = state.models[repo_id]
    record: list[Change] = [_failed(model, text, ModelState.LOADABLE, now)]
    act: list[Effect] = []
    failure = Failure("host_lost", f"The process that held {repo_id} died: {text}")
    for held in state.computing:
        if held.order.model.repo_id == repo_id and held.started:
            ended = _end(
                state, held.key, AttemptStatus.FAILED, now, failure=failure, blame=Blame.SITE, kill="host_lost"
            )
            record += ended.record
            act += ended.act
    return Decision(tuple(record), (*act, SendAdvert()))


def _retry(model: Model, state: State) -> Decision:
    """Return what a model that is not loaded does when its backoff is over: load, or be loadable again."""
    repo_id = model.offer.repo_id
    if model.preload or _waiting(state, repo_id):
        return Decision((_loading(model),), (LoadModel(repo_id),))
    if model.offer.state is ModelState.FAILED:
        return Decision((ModelChanged(replace(model, offer=replace(model.offer, state=ModelState.LOADABLE))),))
    return Decision()


def _loading(model: Model) -> ModelChanged:
    return ModelChanged(replace(model, offer=replace(model.offer, state=ModelState.LOADING, detail="starting")))


def _failed(model: Model, text: str, state: ModelState, now: Now) -> ModelChanged:
    """Count a failure: the first retry comes at once for a lost host, later ones back off up to a minute."""
    failures = model.failures + 1
    wait = 0 if failures == 1 and state is ModelState.LOADABLE else min(MAX_BACKOFF_MS, 500 << min(failures, 8))
    offer = replace(model.offer, state=state, detail=text[:300])
    return ModelChanged(replace(model, offer=offer, failures=failures, retry_at_ms=now.monotonic_ms + wait))


def _waiting(state: State, repo_id: str) -> list[Held]:
    return [held for held in state.held.values() if not held.started and held.order.model.repo_id == repo_id]


# --------------------------------------------------------------------------------------- pieces


def _report(held: Held, status: AttemptStatus, state: State, now: Now, detail: str) -> Report:
    return _bare_report(state, held.key, held.digest, held.epoch, held.sequence + 1, now, status, detail=detail)


def _bare_report(
    state: State,
    key: tuple[JobId, AttemptNumber],
    digest: Digest,
    epoch: Epoch,
    sequence: int,
    now: Now,
    status: AttemptStatus,
    *,
    detail: str = "",
    failure: Failure | None = None,
) -> Report:
    return Report(
        site=state.policy.site,
        boot=state.boot,
        job=key[0],
        attempt=key[1],
        sequence=sequence,
        status=status,
        issued_at_ms=now.wall_ms,
        order_digest=digest,
        detail=detail,
        failure=failure,
        blame=Blame.SITE if status is AttemptStatus.FAILED else None,
        epoch=epoch,
    )


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
