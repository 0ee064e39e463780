"""Rules about results that are kept: how long, how many bytes for whom, and their deletion, which ends when it is done everywhere.

Time alone needs no rule here: what has reached its `until_ms` is dropped by the broker's own bound on age, and by the sites'.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.core.decision import Draft, PurgeJob
from coordinator.core.events import JobPurged
from coordinator.core.state import JobRecord, Keeping, MeshState, borrowers
from edif_mesh.domain.ids import AttemptNumber, JobId, KeyId, SiteId
from edif_mesh.wire.messages import Manifest

MAX_DROPS = 100
"""The most jobs that one answer to an advert tells a site to drop."""


def kept_from(draft: Draft, manifest: Manifest) -> Keeping:
    """Return what is kept of a result that was committed now."""
    until_ms = draft.now_ms + draft.state.policy.keep_results_ms
    for lender in manifest.lenders:  # their chunks lie at the broker for no longer than they were to be kept
        lent = draft.state.kept.get(lender.job)
        until_ms = min(until_ms, lent.until_ms) if lent is not None else until_ms
    return Keeping(manifest.stored_bytes, until_ms, tuple(dict.fromkeys(lender.job for lender in manifest.lenders)))


def gone_lender(draft: Draft, owner: KeyId, manifest: Manifest) -> JobId | None:
    """Return a job whose chunks a manifest uses again although they are not kept for its owner (any more), or None."""
    for lender in manifest.lenders:
        kept = draft.state.kept.get(lender.job)
        if kept is None or kept.owner != owner:
            return lender.job
    return None


def too_much_kept(state: MeshState, owner: KeyId) -> tuple[str, str] | None:
    """Why a researcher may order nothing more: code and text; or None."""
    used, most = state.kept_bytes.get(owner, 0), state.policy.max_kept_bytes
    if used < most:
        return None
    return "kept_full", (
        f"Your kept results take {used / 1e9:,.2f} GB; {most / 1e9:,.2f} GB are allowed for one researcher. "
        "Delete what you do not need: `edif jobs` shows how large each result is, `edif rm JOB` deletes it."
    )


def begin_deletion(draft: Draft, job: JobRecord) -> JobRecord:
    """Begin to delete an ended job's payload, result and lines everywhere; a second time changes nothing."""
    keeping = job.keeping or Keeping(0, draft.now_ms)
    if keeping.deleted_at_ms is None:
        held = (draft.attempt((job.job, AttemptNumber(number))) for number in range(1, job.attempt + 1))
        sites = tuple(dict.fromkeys(attempt.site for attempt in held if attempt is not None))
        keeping = replace(keeping, deleted_at_ms=draft.now_ms, drop_at=sites)
        job = draft.change_job(job, keeping=keeping)
        text = (
            f"asked by {job.owner_name or job.owner}: {keeping.stored_bytes} bytes, at {', '.join(sites) or 'no site'}"
        )
        draft.audit("result deletion asked", job=job, text=text)
        purge(draft, job)
    return job


def job_purged(draft: Draft, event: JobPurged) -> None:
    """The broker has deleted what it held of the job; it counts once no site can store anything more."""
    job = draft.job(event.job)
    if job is None or job.keeping is None or job.keeping.drop_at:
        return
    if job.keeping.deleting and not job.keeping.purged:
        job = draft.change_job(job, keeping=replace(job.keeping, purged=True))
        draft.audit("result deleted at the broker", job=job)


def dropped_at(draft: Draft, site: SiteId, jobs: tuple[JobId, ...]) -> None:
    """A site says that it holds nothing of these jobs any more."""
    for name in jobs:
        job = draft.job(name)
        if job is not None and job.keeping is not None and site in job.keeping.drop_at:
            left = tuple(other for other in job.keeping.drop_at if other != site)
            job = draft.change_job(job, keeping=replace(job.keeping, drop_at=left))
            draft.audit("result deleted at a site", job=job, text=site)


def to_drop(draft: Draft, site: SiteId) -> tuple[JobId, ...]:
    """Return the jobs of which a site has to drop what it holds."""
    wanted = []
    for name in draft.state.deleting:
        job = draft.job(name)
        if job is not None and job.keeping is not None and site in job.keeping.drop_at:
            wanted.append(name)
    return tuple(wanted[:MAX_DROPS])


def tend_deletions(draft: Draft) -> None:
    """Repeat what has not been done: after a restart, and once nobody borrows from a deleted result any more."""
    for name in list(draft.state.deleting):
        job = draft.job(name)
        if job is not None and job.keeping is not None and not job.keeping.drop_at:
            purge(draft, job)


def purge(draft: Draft, job: JobRecord) -> None:
    """Have the broker forget the job, unless that is done or a kept result uses its chunks."""
    keeping = job.keeping
    if (
        keeping is not None
        and keeping.deleting
        and not keeping.purged
        and not borrowers(draft.state, job.job, draft.now_ms)
    ):
        draft.send(PurgeJob(job.job))
