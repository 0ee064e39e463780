"""What a researcher sees: a job's snapshot with one sentence, and the view of the whole mesh."""

from __future__ import annotations

from dataclasses import replace

from coordinator.core.decision import Draft
from coordinator.core.placement import BUSY, only_permanent
from coordinator.core.queue import position
from coordinator.core.schedule import verdicts_for
from coordinator.core.state import AttemptRecord, JobRecord, Keeping, borrowers
from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.ids import AttemptNumber, SiteId
from edif_mesh.domain.job import Failure, JobStatus
from edif_mesh.domain.site import SiteStatus
from edif_mesh.wire.messages import AttemptView, JobSnapshot, MeshView, SiteVerdict, SiteView

_BRIEF_TEXT = 300


def snapshot(draft: Draft, job: JobRecord, *, explain: bool = False, brief: bool = False) -> JobSnapshot:
    """Return the job as its owner sees it; with `explain`, every site's verdict; `brief` leaves the bulky parts out."""
    place = position(draft, job)
    attempts = [draft.attempt((job.job, AttemptNumber(n))) for n in range(1, job.attempt + 1)]
    views = tuple(_view(a) for a in attempts if a is not None)
    eta = _eta_ms(draft, job, place)
    why: tuple[SiteVerdict, ...] = ()
    if explain:
        current = draft.current_attempt(job)
        why = verdicts_for(draft, job) if job.status is JobStatus.QUEUED or current is None else current.verdicts
    failure = job.failure
    if brief and failure is not None and len(failure.text) > _BRIEF_TEXT:
        failure = Failure(failure.code, "[...] " + failure.text[-_BRIEF_TEXT:])
    return JobSnapshot(
        job=job.job,
        version=job.version,
        status=job.status,
        text=sentence(draft, job, place, eta),
        model=job.order.model,
        owner=job.owner,
        submitted_at_ms=job.submitted_at_ms,
        updated_at_ms=job.updated_at_ms,
        expires_at_ms=job.order.expires_at_ms,
        attempts=() if brief else views,
        position=place,
        eta_ms=eta,
        name=job.order.name,
        site=_site(draft, job),
        failure=failure,
        manifest=None if brief or _is_gone(draft, job) else job.manifest,
        why=why,
        order_digest=job.order_digest,
        epoch=draft.epoch or draft.state.epoch,
        result_bytes=job.keeping.stored_bytes if job.keeping is not None and job.keeping.deleted_at_ms is None else 0,
        keep_until_ms=job.keeping.until_ms if job.keeping is not None and job.manifest is not None else None,
        deleted_at_ms=job.keeping.deleted_at_ms if job.keeping is not None else None,
    )


def sentence(draft: Draft, job: JobRecord, place: int | None, eta_ms: int | None) -> str:
    """Return where the job is, in one sentence for a person."""
    lost = _lost_sites(draft, job)
    after = f"; {', '.join(lost)} {'was' if len(lost) == 1 else 'were'} lost" if lost else ""
    if job.status is JobStatus.QUEUED:
        ahead = f"Queued, position {place}" if place else "Queued"
        wait = f", about {max(1, round(eta_ms / 1000))} s" if eta_ms is not None else ""
        return f"{ahead}{wait}{after}{_hindrance(draft, job)}."
    if job.status in (JobStatus.PLACED, JobStatus.RUNNING):
        attempt = draft.current_attempt(job)
        if attempt is None:
            return job.text
        word = {AttemptStatus.LOADING: "Loading the model", AttemptStatus.RUNNING: "Running"}.get(
            attempt.status, "Placed"
        )
        detail = f": {attempt.detail}" if attempt.status is AttemptStatus.LOADING and attempt.detail else ""
        return f"{word} at {attempt.site} (attempt {attempt.attempt}{after}){detail}."
    if job.keeping is not None and job.keeping.deleted_at_ms is not None:
        return f"{job.text or job.status.value} {_deletion(draft, job, job.keeping)}"
    if job.status is JobStatus.SUCCEEDED:
        late = " Its result was kept for as long as the mesh keeps results." if _is_gone(draft, job) else ""
        return f"Succeeded at {job.result_site} (attempt {job.attempt}{after}).{late}"
    return job.text or job.status.value


def _is_gone(draft: Draft, job: JobRecord) -> bool:
    """Whether the mesh does not keep the job's result any more."""
    keeping = job.keeping
    return keeping is not None and (keeping.deleted_at_ms is not None or keeping.until_ms <= draft.now_ms)


def _deletion(draft: Draft, job: JobRecord, keeping: Keeping) -> str:
    if not keeping.deleting:
        return "Its owner has deleted its payload, result and lines."
    users = borrowers(draft.state, job.job, draft.now_ms)
    if not keeping.purged and users:
        names = ", ".join(users[:3])
        return (
            f"Its owner has deleted it; its chunks go when {names}, which uses them too, is deleted or its time is up."
        )
    at = ", ".join([*(["the broker"] if not keeping.purged else []), *keeping.drop_at])
    return f"Its owner has deleted it; still to be deleted at: {at}."


def mesh_view(draft: Draft) -> MeshView:
    """Return all sites, and how much is queued and running."""
    running = sum(1 for key in draft.state.active if draft.state.attempts[key].status is AttemptStatus.RUNNING)
    sites = tuple(
        SiteView(
            site=s.site,
            status=s.status,
            country=s.advert.country,
            seen_at_ms=s.seen_at_ms,
            slots=s.advert.slots,
            free_slots=max(0, s.advert.slots - len(draft.active_at(s.site))),
            memory_bytes=s.advert.memory_bytes,
            free_memory_bytes=s.advert.free_memory_bytes,
            devices=s.advert.devices,
            models=s.advert.models,
            versions=s.advert.versions,
            attempts=s.advert.attempts,
            sandbox=s.advert.sandbox,
            note=s.advert.note,
            models_bytes=s.advert.models_bytes,
            free_models_bytes=s.advert.free_models_bytes,
            evictable_bytes=s.advert.evictable_bytes,
        )
        for s in sorted(draft.sites(), key=lambda s: s.site)
    )
    return MeshView(
        draft.state.federation, draft.epoch or draft.state.epoch, draft.now_ms, sites, len(draft.state.queue), running
    )


def _view(attempt: AttemptRecord) -> AttemptView:
    return AttemptView(
        attempt=attempt.attempt,
        site=attempt.site,
        status=attempt.status,
        granted_at_ms=attempt.granted_at_ms,
        ended_at_ms=attempt.ended_at_ms,
        started_at_ms=attempt.started_at_ms,
        detail=attempt.detail,
        failure=attempt.failure and replace(attempt.failure, text=attempt.failure.text[:2000]),
        receipt=attempt.receipt,
    )


def _eta_ms(draft: Draft, job: JobRecord, place: int | None) -> int | None:
    run = draft.state.run_ms.get(job.order.model.repo_id)
    slots = sum(s.advert.slots for s in draft.sites() if s.status is SiteStatus.ACTIVE)
    if place is None or run is None or slots == 0:
        return None
    return int(run * (place / slots + 1))


def _site(draft: Draft, job: JobRecord) -> SiteId | None:
    if job.status is JobStatus.SUCCEEDED:
        return job.result_site
    attempt = draft.current_attempt(job) if job.status in (JobStatus.PLACED, JobStatus.RUNNING) else None
    return attempt.site if attempt is not None else None


def _lost_sites(draft: Draft, job: JobRecord) -> list[str]:
    found = [draft.attempt((job.job, AttemptNumber(n))) for n in range(1, job.attempt + 1)]
    return list(dict.fromkeys(a.site for a in found if a is not None and a.status is AttemptStatus.LOST))


def _hindrance(draft: Draft, job: JobRecord) -> str:
    """Say what must change first when no site would take the job now, even with all its slots free."""
    if not any(s.status is SiteStatus.ACTIVE for s in draft.sites()):
        return "; no site takes work at present"
    verdicts = verdicts_for(draft, job)
    if any(all(reason.code in BUSY for reason in verdict.reasons) for verdict in verdicts):
        return ""
    hopeful = [v for v in verdicts if not only_permanent(v)]
    texts = [reason.text.rstrip(".") for v in hopeful for reason in v.reasons if reason.code not in BUSY]
    return f"; waiting: {texts[0]}" if texts else "; no site offers what it needs at present"
