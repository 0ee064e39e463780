"""Rules about attempts that are held: how far they are, how they end, and what is reported of that."""

from __future__ import annotations

from dataclasses import replace

from edif_mesh.domain.attempt import AttemptStatus, Blame, Receipt
from edif_mesh.domain.ids import AttemptNumber, Digest, Epoch, JobId
from edif_mesh.domain.job import Failure
from edif_mesh.wire.messages import Report
from site_agent.core.changes import AttemptEnded, Audited, Change, HeldChanged, ModelChanged, ModelUsed, Reported
from site_agent.core.effects import Decision, Effect, KillAttempt, SendAdvert, SendReport
from site_agent.core.state import AttemptKey, Ending, Held, Now, State


def progress(state: State, key: AttemptKey, status: AttemptStatus, now: Now, detail: str = "") -> Decision:
    """Report how far a held attempt is; nothing once it is being stopped."""
    held = state.held.get(key)
    if held is None or held.ending is not None:
        return Decision()
    report = report_of(held, status, state, now, detail=detail)
    return Decision((Reported(report),), (SendReport(report),))


def computed(state: State, key: AttemptKey, now: Now) -> Decision:
    """The runner has ended well: its slot is free, and its model has proven itself."""
    held = state.held.get(key)
    if held is None:
        return Decision()
    record: list[Change] = [HeldChanged(replace(held, computed=True))]
    model = state.models.get(held.order.model.repo_id)
    if model is not None and model.failures:
        record.append(ModelChanged(replace(model, failures=0)))
    return Decision((*record, ModelUsed(held.order.model.repo_id, now)), (SendAdvert(),))


def payload_refused(state: State, key: AttemptKey, failure: Failure, now: Now) -> Decision:
    """Nothing was run: declined, unless the site has said already that it began."""
    held = state.held.get(key)
    if held is not None and held.status is AttemptStatus.ACCEPTED:
        return end(state, key, AttemptStatus.DECLINED, now, failure=failure, detail=failure.text)
    return end(state, key, AttemptStatus.FAILED, now, failure=failure, blame=Blame.SITE)


def end(
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
        report_of(held, status, state, now, detail=said.detail),
        failure=failure,
        blame=said.blame,
        receipt=receipt,
        manifest=manifest if status is AttemptStatus.SUCCEEDED else None,
    )
    advert: tuple[Effect, ...] = () if held.computed else (SendAdvert(),)
    used = (ModelUsed(held.order.model.repo_id, now),) if held.started and not held.computed else ()
    why = f"{held.job} attempt {held.attempt} {status}" + (f": {failure.code}" if failure else "")
    return Decision((AttemptEnded(report), Audited("ended", why), *used), (SendReport(report), *advert))


def stopped(state: State, key: AttemptKey, receipt: Receipt | None, now: Now) -> Decision:
    """Its runner is gone: now the report that was decided when it was to be stopped."""
    held = state.held.get(key)
    if held is None or held.ending is None:
        return Decision()
    return end(state, key, held.ending.status, now, receipt=receipt)


def report_of(held: Held, status: AttemptStatus, state: State, now: Now, detail: str) -> Report:
    """Return the next report of a held attempt."""
    return bare_report(state, held.key, held.digest, held.epoch, held.sequence + 1, now, status, detail=detail)


def bare_report(
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
    """Return a report of an attempt that need not be held."""
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


def waiting_for(state: State, repo_id: str) -> list[Held]:
    """Return the attempts that wait for the model to be loaded."""
    return [held for held in state.held.values() if not held.started and held.order.model.repo_id == repo_id]
