"""Scheduling: give what is queued to the sites that fit, in order, as far as there is room. One pass a decision."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.core.decision import Draft, SendGrant
from coordinator.core.placement import BUSY, choose, find_offer, judge
from coordinator.core.queue import Turns
from coordinator.core.room import in_the_way
from coordinator.core.state import AttemptRecord, JobRecord, Policy, SiteRecord
from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.ids import AttemptNumber, SiteId
from edif_mesh.domain.job import Failure, JobStatus
from edif_mesh.wire.messages import Grant, SiteVerdict

UNTRIED_WAIT_MS = 60_000
"""How long a job waits for a busy site that it has not tried rather than go where it failed before."""


@dataclass
class Room:
    """What is left at one site: its advert, less every attempt of ours that it may hold (the ledger)."""

    slots: int
    memory_bytes: int
    busy: set[str] = field(default_factory=set)
    """The models of those attempts: each is loaded there, or will be."""
    leaving: set[str] = field(default_factory=set)
    """Models that get no more work in this pass: who comes before waits for their memory."""


def schedule(draft: Draft) -> None:
    """Place queued jobs until nothing more fits. A job that must wait never blocks one that another site can take."""
    rooms = {site.site: room_at(draft, site) for site in draft.sites()}
    if not any(room.slots > 0 for room in rooms.values()):
        return
    refused: set[tuple[object, ...]] = set()
    turns = Turns(draft)
    for job in turns:
        if job.not_before_ms > draft.now_ms:
            continue
        shape = _shape(job)
        if shape in refused:
            continue
        verdicts = verdicts_for(draft, job, rooms)
        best = choose(job, verdicts)
        if best is None:
            refused.add(shape)
            _ask_to_leave(draft, job, verdicts, rooms)
            continue
        if best.site in job.tried and _better_waits(draft, job, verdicts):
            continue
        if not _grant(draft, job, best, verdicts):
            continue
        turns.charge(job)
        rooms[best.site].slots -= 1
        rooms[best.site].memory_bytes -= job.order.limits.memory_bytes
        rooms[best.site].busy.add(job.order.model.repo_id)
        if not any(room.slots > 0 for room in rooms.values()):
            return


def verdicts_for(draft: Draft, job: JobRecord, rooms: dict[SiteId, Room] | None = None) -> tuple[SiteVerdict, ...]:
    """Return every site's verdict on the job as things stand."""
    run_ms = draft.state.run_ms.get(job.order.model.repo_id, 0.0)
    result = []
    for site in sorted(draft.sites(), key=lambda s: s.site):
        room = rooms[site.site] if rooms is not None else room_at(draft, site)
        result.append(
            judge(
                job.order,
                site,
                free_slots=room.slots,
                free_memory_bytes=room.memory_bytes,
                tried=site.site in job.tried,
                run_ms=run_ms,
                busy=room.busy,
                leaving=room.leaving,
                now_ms=draft.now_ms,
                keeps_too_much=draft.state.kept_bytes_at.get(site.site, 0) >= draft.state.policy.max_site_kept_bytes,
            )
        )
    return tuple(result)


def room_at(draft: Draft, site: SiteRecord) -> Room:
    """Return the room at a site: never more than its advert states, less what the coordinator has given it."""
    ours = draft.active_at(site.site)
    orders = [job.order for attempt in ours if (job := draft.job(attempt.job)) is not None]
    memory = sum(order.limits.memory_bytes for order in orders)
    busy = {order.model.repo_id for order in orders}
    return Room(site.advert.slots - len(ours), site.advert.memory_bytes - memory, busy)


def lease_end(policy: Policy, now_ms: int) -> int:
    """Return when a lease that is granted or renewed now has lapsed for certain."""
    return now_ms + policy.lease_ms + policy.margin_ms


def _ask_to_leave(draft: Draft, job: JobRecord, verdicts: tuple[SiteVerdict, ...], rooms: dict[SiteId, Room]) -> None:
    """Where only memory for the job's model is missing, what is in its way gets no more work, at one site."""
    for verdict in verdicts:
        site = draft.site(verdict.site)
        offer = find_offer(job.order, site) if site is not None else None
        if site is None or offer is None or {reason.code for reason in verdict.reasons} != {"no_room"}:
            continue
        room = rooms[verdict.site]
        if leaving := in_the_way(offer, site, room.busy, draft.now_ms):
            room.leaving |= leaving
            return


def _better_waits(draft: Draft, job: JobRecord, verdicts: tuple[SiteVerdict, ...]) -> bool:
    """Whether a site where the job has not failed yet is only busy: worth waiting for, but not for ever."""
    if draft.now_ms - job.updated_at_ms >= UNTRIED_WAIT_MS:
        return False
    untried = [verdict for verdict in verdicts if verdict.site not in job.tried]
    return any(verdict.reasons and all(r.code in BUSY for r in verdict.reasons) for verdict in untried)


def _shape(job: JobRecord) -> tuple[object, ...]:
    """What decides whether a site fits, without the job's own name: equal shapes get equal answers in one pass."""
    order = job.order
    return (order.model, order.audience, order.limits, order.client.nnsight, order.sandbox, job.tried)


def _grant(draft: Draft, job: JobRecord, best: SiteVerdict, verdicts: tuple[SiteVerdict, ...]) -> bool:
    policy, now = draft.state.policy, draft.now_ms
    number = AttemptNumber(job.attempt + 1)
    if number > job.order.max_attempts:
        draft.change_job(
            job,
            status=JobStatus.FAILED,
            text=f"Given up: all {job.order.max_attempts} attempts that the order allows were used.",
            failure=Failure(
                "attempts_used_up", f"All {job.order.max_attempts} attempts that the order allows were used."
            ),
        )
        return False
    attempt = AttemptRecord(
        job=job.job,
        attempt=number,
        site=best.site,
        status=AttemptStatus.GRANTED,
        epoch=draft.state.epoch,
        granted_at_ms=now,
        deadline_at_ms=lease_end(policy, now),
        sent_at_ms=now,
        verdicts=verdicts,
    )
    draft.change_attempt(attempt)
    draft.change_job(job, status=JobStatus.PLACED, attempt=number, text=f"Placed at {best.site} (attempt {number}).")
    draft.send(grant_message(draft, job, attempt))
    return True


def grant_message(draft: Draft, job: JobRecord, attempt: AttemptRecord) -> SendGrant:
    """Return the grant of an attempt as it is to be signed and sent now."""
    policy, epoch = draft.state.policy, draft.epoch or draft.state.epoch
    grant = Grant(
        order_digest=job.order_digest,
        job=job.job,
        site=attempt.site,
        attempt=attempt.attempt,
        epoch=epoch,
        issued_at_ms=draft.now_ms,
        lease_ms=policy.lease_ms,
        expires_at_ms=draft.now_ms + policy.lease_ms,
    )
    return SendGrant(grant, job.order_envelope)
