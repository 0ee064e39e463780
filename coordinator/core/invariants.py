"""What must never happen, as a function over one decision: the simulator and the fault tests call it after every step."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.core.decision import Decision
from coordinator.core.room import memory_in_use
from coordinator.core.state import (
    AttemptChanged,
    AttemptKey,
    AttemptRecord,
    Audited,
    JobChanged,
    JobRecord,
    MeshState,
    SiteChanged,
    SiteRecord,
    TermChanged,
)
from edif_mesh.domain.attempt import ATTEMPT_TRANSITIONS
from edif_mesh.domain.ids import AttemptNumber, JobId, SiteId
from edif_mesh.domain.job import JOB_TRANSITIONS, JobStatus
from edif_mesh.domain.site import ModelState, confines


def broken_by(decision: Decision, before: MeshState) -> list[str]:
    """Return what the decision breaks, in sentences; `before` is the state that it was made on (not yet applied)."""
    jobs = {c.record.job: c.record for c in decision.record if isinstance(c, JobChanged)}
    attempts = {(c.record.job, c.record.attempt): c.record for c in decision.record if isinstance(c, AttemptChanged)}
    found = [text for job in jobs.values() for text in _job(job, before)]
    found += [text for attempt in attempts.values() for text in _attempt(attempt, before, attempts, jobs)]
    found += list(_room(before, attempts))
    found += list(
        _models(
            before, attempts, jobs, {c.record.site: c.record for c in decision.record if isinstance(c, SiteChanged)}
        )
    )
    found += [text for attempt in attempts.values() for text in _sandbox(attempt, before, jobs)]
    moved = sum(_moved_job(job, before) for job in jobs.values())
    moved += sum(_moved_attempt(attempt, before) for attempt in attempts.values())
    told = sum(1 for c in decision.record if isinstance(c, Audited) and (c.what.startswith(("job ", "attempt "))))
    if told < moved:
        found.append(f"{moved} transitions, but {told} audit lines")
    epochs = [c.epoch for c in decision.record if isinstance(c, TermChanged)]
    found += [f"the epoch fell from {before.epoch} to {epoch}" for epoch in epochs if epoch <= before.epoch]
    return found


def _job(job: JobRecord, before: MeshState) -> Iterator[str]:
    old = before.jobs.get(job.job)
    if old is None:
        return
    if old.terminal and job.status is not old.status:
        yield f"{job.job} was {old.status} for ever and is {job.status}"
    # Several steps in one decision are fine when each was allowed: QUEUED again and PLACED again.
    reachable = {s for m in JOB_TRANSITIONS[old.status] for s in JOB_TRANSITIONS[m] | {m}}
    if job.status is not old.status and job.status not in reachable:
        yield f"{job.job} went from {old.status} to {job.status}"
    if job.version <= old.version:
        yield f"{job.job} changed without a new version"
    if old.manifest is not None and job.manifest != old.manifest:
        yield f"{job.job} has another result than the committed one"
    if job.attempt < old.attempt or job.attempt > job.order.max_attempts:
        yield f"{job.job} is at attempt {job.attempt} after {old.attempt}; {job.order.max_attempts} are allowed"
    if job.status is JobStatus.SUCCEEDED and job.manifest is None:
        yield f"{job.job} succeeded without a result"


def _attempt(
    attempt: AttemptRecord,
    before: MeshState,
    now: dict[AttemptKey, AttemptRecord],
    jobs: dict[JobId, JobRecord],
) -> Iterator[str]:
    key = (attempt.job, attempt.attempt)
    old = before.attempts.get(key)
    if old is not None:
        if old.site != attempt.site:
            yield f"attempt {key} moved from {old.site} to {attempt.site}"
        if old.status.terminal and attempt.status is not old.status:
            yield f"attempt {key} was {old.status} for ever and is {attempt.status}"
        if attempt.sequence < old.sequence:
            yield f"attempt {key} took back a report"
        return
    if attempt.attempt > 1:
        earlier = (attempt.job, AttemptNumber(attempt.attempt - 1))
        previous = now.get(earlier) or before.attempts.get(earlier)
        if previous is None or not previous.status.terminal:
            yield f"attempt {key} began before the one before it had ended"
    if attempt.status not in ATTEMPT_TRANSITIONS:
        yield f"attempt {key} has the unknown state {attempt.status}"


def _room(before: MeshState, attempts: dict[AttemptKey, AttemptRecord]) -> Iterator[str]:
    """Grants never exceed the slots that a site has advertised."""
    for site in {a.site for k, a in attempts.items() if k not in before.attempts}:
        active = {k for k in before.active_at.get(site, ()) if attempts.get(k, before.attempts[k]).active}
        active |= {k for k, a in attempts.items() if a.site == site and a.active}
        record = before.sites.get(site)
        slots = record.advert.slots if record is not None else None
        if slots is not None and len(active) > slots and any(k not in before.attempts for k in active):
            yield f"{site} has {slots} slots and {len(active)} attempts"


def _models(
    before: MeshState,
    attempts: dict[AttemptKey, AttemptRecord],
    jobs: dict[JobId, JobRecord],
    sites: dict[SiteId, SiteRecord],
) -> Iterator[str]:
    """No attempt is made for a model that is not loaded while the models in use leave no room for it."""
    for key, attempt in attempts.items():
        record = sites.get(attempt.site) or before.sites.get(attempt.site)
        job = jobs.get(attempt.job) or before.jobs.get(attempt.job)
        if key in before.attempts or record is None or job is None or not record.advert.models_bytes:
            continue
        loaded = {offer.repo_id for offer in record.advert.models if offer.state is ModelState.LOADED}
        others = {k: attempts.get(k, before.attempts[k]) for k in before.active_at.get(attempt.site, ())}
        others |= {k: a for k, a in attempts.items() if a.site == attempt.site}
        held = {(jobs.get(a.job) or before.jobs[a.job]).order.model.repo_id for a in others.values() if a.active}
        used = memory_in_use(record, held)
        if job.order.model.repo_id not in loaded and used > record.advert.models_bytes:
            yield f"{attempt.site} gives {record.advert.models_bytes} bytes to models, and those in use need {used}"


def _sandbox(attempt: AttemptRecord, before: MeshState, jobs: dict[JobId, JobRecord]) -> Iterator[str]:
    """No attempt is made at a site whose sandbox is weaker than the order demands."""
    job, site = jobs.get(attempt.job) or before.jobs.get(attempt.job), before.sites.get(attempt.site)
    if job is None or site is None or (attempt.job, attempt.attempt) in before.attempts:
        return
    if not confines(site.advert.sandbox, job.order.sandbox):
        yield f"{attempt.job} demands {job.order.sandbox or 'a sandbox'} and was placed at {site.site} ({site.advert.sandbox or 'none'})"


def _moved_job(job: JobRecord, before: MeshState) -> int:
    old = before.jobs.get(job.job)
    return int(old is None or old.status is not job.status)


def _moved_attempt(attempt: AttemptRecord, before: MeshState) -> int:
    old = before.attempts.get((attempt.job, attempt.attempt))
    return int(old is None or old.status is not attempt.status)
