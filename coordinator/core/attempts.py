"""Rules about attempts: grants that are answered or not, reports, losses, retries, stops."""

from __future__ import annotations

import zlib
from dataclasses import replace

from coordinator.core.decision import Draft, Reply, SendStop
from coordinator.core.events import GrantAnswered, GrantUndelivered, SiteReported
from coordinator.core.keeping import gone_lender, kept_from
from coordinator.core.schedule import grant_message, lease_end
from coordinator.core.state import AttemptRecord, JobRecord, SiteRecord
from edif_mesh.domain.attempt import ATTEMPT_TRANSITIONS, AttemptStatus, Blame
from edif_mesh.domain.ids import SiteId
from edif_mesh.domain.job import Failure, JobStatus
from edif_mesh.domain.site import SiteStatus
from edif_mesh.wire.messages import Manifest, Report, ReportReceived, StopAttempt

AGENT_RESTARTED = "agent_restarted"
"""The failure code of a report that a new run of an agent makes of an attempt that its old run held: it is gone."""
_PROGRESS = frozenset({AttemptStatus.ACCEPTED, AttemptStatus.LOADING, AttemptStatus.RUNNING})


def grant_answered(draft: Draft, event: GrantAnswered) -> None:
    """The site holds the grant: stop repeating it."""
    attempt = draft.attempt((event.job, event.attempt))
    if attempt is None or attempt.site != event.site or not attempt.active or attempt.answered:
        return
    draft.change_attempt(
        attempt, answered=True, missing=0, boot=event.boot, deadline_at_ms=lease_end(draft.state.policy, draft.now_ms)
    )


def grant_undelivered(draft: Draft, event: GrantUndelivered) -> None:
    """Nobody listened. When no other sending can have arrived, the attempt never began: place it elsewhere at once."""
    attempt = draft.attempt((event.job, event.attempt))
    if attempt is None or attempt.status is not AttemptStatus.GRANTED or attempt.answered or attempt.missing:
        return
    _no_more_work(draft, event.site)
    lose(draft, attempt, Failure("unreachable", f"{attempt.site} could not be reached."))


def site_reported(draft: Draft, event: SiteReported) -> None:
    """Apply a report of the current attempt; answer every report, so that the site can forget it."""
    report = event.report
    if report.epoch > draft.state.epoch:
        return  # a newer coordinator leads: this one must not tell the site to forget anything
    attempt, job = draft.attempt((report.job, report.attempt)), draft.job(report.job)
    if attempt is not None and job is not None and attempt.site == report.site:
        if report.sequence > attempt.sequence:
            _apply(draft, job, attempt, report, event.manifest)
        job = draft.job(report.job)
        attempt = draft.attempt((report.job, report.attempt))
    committed = (
        job is not None
        and attempt is not None
        and job.status is JobStatus.SUCCEEDED
        and job.attempt == report.attempt
        and attempt.site == report.site
    )
    if event.reply_to:
        answer = ReportReceived(
            site=report.site,
            job=report.job,
            attempt=report.attempt,
            sequence=report.sequence,
            epoch=draft.state.epoch,
            issued_at_ms=draft.now_ms,
            result_committed=committed,
        )
        draft.send(Reply(event.reply_to, answer))


def lose(draft: Draft, attempt: AttemptRecord, failure: Failure) -> None:
    """The attempt is gone for certain, or its lease has lapsed: the job goes on without it."""
    ended = draft.change_attempt(
        attempt, status=AttemptStatus.LOST, ended_at_ms=draft.now_ms, failure=failure, stop_reason=None
    )
    _trouble(draft, attempt.site, +1)
    job = draft.job(attempt.job)
    if job is not None and not job.terminal and job.attempt == attempt.attempt:
        again(draft, job, ended.site, failure, counts=True)


def again(draft: Draft, job: JobRecord, site: SiteId, failure: Failure, *, counts: bool) -> None:
    """Queue the job for its next attempt, or fail it when its budget of losses is used up."""
    policy = draft.state.policy
    losses = job.losses + (1 if counts else 0)
    if losses >= policy.max_losses:
        text = f"Given up after {losses} attempts that were lost at their sites; the last: {failure.text}"
        draft.change_job(job, status=JobStatus.FAILED, losses=losses, failure=Failure(failure.code, text), text=text)
        return
    if job.attempt >= job.order.max_attempts:
        text = (
            f"Given up: all {job.order.max_attempts} attempts that the order allows were used; the last: {failure.text}"
        )
        draft.change_job(job, status=JobStatus.FAILED, losses=losses, failure=Failure(failure.code, text), text=text)
        return
    tried = (*job.tried, site) if site not in job.tried else job.tried
    # The first retry is at once; later ones wait, each job a little differently (a hash stands in for the dice).
    spread = 0.5 + (zlib.crc32(f"{job.job}/{job.attempt}".encode()) % 1000) / 1000
    delay = 0 if losses <= 1 and counts else int(policy.retry_backoff_ms * 2 ** min(job.attempt, 6) * spread)
    draft.change_job(
        job,
        status=JobStatus.QUEUED,
        losses=losses,
        tried=tried,
        not_before_ms=draft.now_ms + delay,
        text=f"Queued again: {failure.text}",
    )


def stop(draft: Draft, attempt: AttemptRecord, reason: str) -> None:
    """The job needs this attempt no more: tell the site until it has confirmed, or its lease has lapsed."""
    stopped = draft.change_attempt(
        attempt, status=AttemptStatus.CANCELLED, ended_at_ms=draft.now_ms, detail=reason, stop_reason=reason
    )
    send_stop(draft, stopped)


def send_stop(draft: Draft, attempt: AttemptRecord) -> None:
    """Send the stop order of an attempt (again)."""
    assert attempt.stop_reason is not None
    draft.change_attempt(attempt, sent_at_ms=draft.now_ms)
    draft.send(
        SendStop(
            StopAttempt(
                job=attempt.job,
                attempt=attempt.attempt,
                site=attempt.site,
                epoch=draft.state.epoch,
                issued_at_ms=draft.now_ms,
                reason=attempt.stop_reason,
            )
        )
    )


def tend_attempts(draft: Draft, *, frozen: bool) -> None:
    """Repeat what was not answered; end what has lapsed, unless expiry is frozen."""
    policy = draft.state.policy
    for key in list(draft.state.active):
        attempt = draft.attempt(key)
        if attempt is None or not attempt.active:
            continue
        if draft.now_ms >= attempt.deadline_at_ms and not frozen:
            if attempt.stop_reason is not None:
                draft.change_attempt(attempt, stop_reason=None)
            else:
                lose(draft, attempt, Failure("lease_expired", f"{attempt.site} fell silent; its lease has lapsed."))
        elif draft.now_ms - attempt.sent_at_ms >= policy.grant_repeat_ms:
            if attempt.stop_reason is not None:
                send_stop(draft, attempt)
            elif attempt.status is AttemptStatus.GRANTED and not attempt.answered:
                _repeat_grant(draft, attempt)


def _repeat_grant(draft: Draft, attempt: AttemptRecord) -> None:
    job, policy = draft.job(attempt.job), draft.state.policy
    if job is None or draft.now_ms - attempt.granted_at_ms > policy.lease_ms:
        return
    # `missing` now says that an earlier sending may have arrived: only the lease can tell that the attempt is gone.
    again_sent = draft.change_attempt(
        attempt, sent_at_ms=draft.now_ms, missing=1, deadline_at_ms=lease_end(policy, draft.now_ms)
    )
    draft.send(grant_message(draft, job, again_sent))


def _apply(draft: Draft, job: JobRecord, attempt: AttemptRecord, report: Report, manifest: Manifest | None) -> None:
    policy = draft.state.policy
    if attempt.status.terminal:
        changes: dict[str, object] = {"sequence": report.sequence}
        if report.status.terminal:  # evidence, and the end of any stopping
            changes.update(stop_reason=None, receipt=report.receipt or attempt.receipt)
        draft.change_attempt(attempt, **changes)
        return
    status, failure, blame = report.status, report.failure, report.blame
    if status is AttemptStatus.SUCCEEDED and not _manifest_fits(job, attempt, report, manifest):
        status, blame = AttemptStatus.FAILED, Blame.SITE
        failure = Failure("bad_manifest", f"{attempt.site} reported a result whose manifest does not fit the job.")
    elif (
        status is AttemptStatus.SUCCEEDED and manifest is not None and (gone := gone_lender(draft, job.owner, manifest))
    ):
        # Deleted while this attempt ran. Nobody's fault; the site learns of it with its next advert.
        status, text = AttemptStatus.RELEASED, f"Its result uses chunks of {gone} again, which is not kept any more."
        failure = Failure("lender_gone", text)
    repeats = (
        status is attempt.status and status in _PROGRESS
    )  # no site may say GRANTED: that is the coordinator's word
    if status not in ATTEMPT_TRANSITIONS[attempt.status] and not repeats:
        draft.change_attempt(attempt, sequence=report.sequence)
        return
    if failure is not None and failure.code == AGENT_RESTARTED:
        lose(draft, draft.change_attempt(attempt, sequence=report.sequence), failure)
        return
    new = draft.change_attempt(
        attempt,
        status=status,
        sequence=report.sequence,
        boot=report.boot,
        answered=True,
        missing=0,
        detail=report.detail[:500],
        failure=failure,
        receipt=report.receipt,
        started_at_ms=attempt.started_at_ms or (draft.now_ms if status is AttemptStatus.RUNNING else None),
        ended_at_ms=draft.now_ms if status.terminal else None,
        deadline_at_ms=attempt.deadline_at_ms if status.terminal else lease_end(policy, draft.now_ms),
    )
    if job.terminal or job.attempt != attempt.attempt:
        return
    if status in _PROGRESS:
        running = status is AttemptStatus.RUNNING
        if running and job.status is not JobStatus.RUNNING:
            draft.change_job(job, status=JobStatus.RUNNING, text=f"Running at {attempt.site}.")
        elif not running:
            draft.change_job(job, text=report.detail[:500])
        return
    _ended(draft, job, new, report, failure, blame, manifest)


def _ended(
    draft: Draft, job: JobRecord, attempt: AttemptRecord, report: Report, failure: Failure | None, blame: Blame | None,
    manifest: Manifest | None,
) -> None:  # fmt: skip
    site, status = attempt.site, attempt.status
    said = failure or Failure(
        status.value.lower(), report.detail or f"{site} ended the attempt ({status.value.lower()})."
    )
    if status is AttemptStatus.SUCCEEDED:
        assert manifest is not None, "`_apply` lets no success pass without one"
        draft.change_job(
            job,
            status=JobStatus.SUCCEEDED,
            manifest=report.manifest,
            result_site=site,
            text=f"Succeeded at {site}.",
            keeping=kept_from(draft, manifest),
        )
        _trouble(draft, site, -1)
    elif status is AttemptStatus.FAILED and blame is Blame.USER:
        draft.change_job(job, status=JobStatus.FAILED, failure=said, text=f"Failed at {site}: {said.line}")
        _trouble(draft, site, -1)
    elif status is AttemptStatus.FAILED and blame is Blame.RUNNER:
        _crashed(draft, job, site, said)
    elif status is AttemptStatus.FAILED:
        _trouble(draft, site, +1)
        again(draft, job, site, said, counts=True)
    elif status in (AttemptStatus.DECLINED, AttemptStatus.RELEASED):
        if status is AttemptStatus.RELEASED and failure is None:  # it is draining; its advert may come after this word
            _no_more_work(draft, site)
        again(draft, job, site, said, counts=False)
    else:
        again(draft, job, site, said, counts=True)


def _crashed(draft: Draft, job: JobRecord, site: SiteId, said: Failure) -> None:
    crashes = job.crashes + 1
    if crashes >= draft.state.policy.max_crashes:
        text = f"Quarantined: it has crashed {crashes} runners. The last, at {site}: {said.text}"
        draft.change_job(
            job, status=JobStatus.QUARANTINED, crashes=crashes, failure=Failure("quarantined", text), text=text
        )
        return
    again(draft, draft.change_job(job, crashes=crashes), site, said, counts=False)


def _manifest_fits(job: JobRecord, attempt: AttemptRecord, report: Report, manifest: Manifest | None) -> bool:
    return (
        manifest is not None
        and report.manifest is not None
        and (manifest.job, manifest.attempt, manifest.site) == (job.job, attempt.attempt, attempt.site)
        and manifest.order_digest == job.order_digest
    )


def _no_more_work(draft: Draft, site: SiteId) -> None:
    """Until it speaks again."""
    record = draft.site(site)
    if record is not None and record.status is SiteStatus.ACTIVE:
        draft.change_site(replace(record, status=SiteStatus.SUSPECT))


def _trouble(draft: Draft, site: SiteId, step: int) -> None:
    record = draft.site(site)
    if record is None or (step < 0 and record.trouble == 0):
        return
    draft.change_site(
        SiteRecord(
            record.site, record.status, record.advert, record.seen_at_ms, record.disconnected_at_ms,
            max(0, min(10, record.trouble + step)),
        )
    )  # fmt: skip
