"""Rules about jobs: an order arrives, a researcher cancels or asks, an order's time is up."""

from __future__ import annotations

import heapq

from coordinator.core.attempts import stop
from coordinator.core.decision import Draft, PublishJob, PublishRefusal, Reply
from coordinator.core.events import CancelRequested, DeletionAsked, JobAsked, JobsAsked, MeshAsked, OrderReceived
from coordinator.core.keeping import begin_deletion, too_much_kept
from coordinator.core.placement import only_permanent
from coordinator.core.schedule import schedule, verdicts_for
from coordinator.core.snapshot import mesh_view, snapshot
from coordinator.core.state import JobRecord, MeshState
from edif_mesh.domain.ids import JobId, KeyId
from edif_mesh.domain.job import Failure, JobStatus
from edif_mesh.wire.messages import COMPRESSIONS, WIRE_DTYPES, JobList, Order, Refusal

MIN_NNSIGHT = (0, 8)
CODECS = frozenset({"nnsight-0.8"})
MAX_LIST = 500
SKEW_MS = 60_000
"""How far a researcher's clock may be ahead."""


def order_received(draft: Draft, event: OrderReceived) -> None:
    """Queue the order and place it if a site fits now; an order that can never run is refused with the reasons."""
    order = event.order
    known = draft.job(order.job)
    if known is not None:
        if known.order_digest == event.digest:
            draft.send(PublishJob(order.job))
        else:
            _refuse(
                draft, order, "duplicate_job", "Another order has this job id already. Submit again: a new id is made."
            )
        return
    problem = _problem(draft, order, event.owner)
    if problem is not None:
        _refuse(draft, order, *problem)
        return
    job = JobRecord(
        job=order.job,
        version=1,
        status=JobStatus.QUEUED,
        order=order,
        order_digest=event.digest,
        order_envelope=event.envelope,
        owner=event.owner,
        owner_name=event.owner_name,
        organisation=event.organisation,
        submitted_at_ms=draft.now_ms,
        updated_at_ms=draft.now_ms,
    )
    problem = _never(draft, job)
    if problem is not None:
        _refuse(draft, order, *problem)
        return
    draft.add_job(job)
    schedule(draft)


def _own(draft: Draft, event: CancelRequested | DeletionAsked | JobAsked) -> JobRecord | None:
    """Return the job that an event is about; None, with the refusal on its way, when it is not known to whoever asks."""
    job = draft.job(event.job)
    if job is not None and job.owner == event.by:
        return job
    _answer(draft, event.reply_to, Refusal(_unknown(event.job), event.job))
    return None


def cancel_requested(draft: Draft, event: CancelRequested) -> None:
    """End the job at once; what runs is stopped. Only the owner may; a second time changes nothing."""
    job = _own(draft, event)
    if job is None:
        return
    if not job.terminal:
        reason = event.reason[:200]
        job = _end(draft, job, JobStatus.CANCELLED, Failure("cancelled", f"Cancelled: {reason}."), "cancelled")
        schedule(draft)
    _answer_job(draft, event.reply_to, job)


def deletion_asked(draft: Draft, event: DeletionAsked) -> None:
    """Begin to delete a job's payload, result and lines everywhere; only its owner may, and only once it has ended."""
    job = _own(draft, event)
    if job is None:
        return
    if not job.terminal:
        failure = Failure("still_running", f"{job.job} has not ended. Cancel it first: edif cancel {job.job}")
        _answer(draft, event.reply_to, Refusal(failure, event.job))
        return
    _answer_job(draft, event.reply_to, begin_deletion(draft, job))


def job_asked(draft: Draft, event: JobAsked) -> None:
    """Answer with the job's snapshot; to its owner only."""
    job = _own(draft, event)
    if job is None:
        return
    _answer_job(draft, event.reply_to, job, explain=event.explain)


def jobs_asked(draft: Draft, event: JobsAsked) -> None:
    """Answer with the owner's jobs, newest first."""
    mine = [job for job in draft.state.jobs.values() if job.owner == event.by]
    mine.sort(key=lambda job: (-job.submitted_at_ms, job.job))
    wanted = mine[: max(0, min(event.limit, MAX_LIST))]
    _answer(draft, event.reply_to, JobList(tuple(snapshot(draft, job, brief=True) for job in wanted)))


def mesh_asked(draft: Draft, event: MeshAsked) -> None:
    """Answer with all sites and the lengths of the queue."""
    _answer(draft, event.reply_to, mesh_view(draft))


def expire_orders(draft: Draft) -> None:
    """End the jobs whose order's time is up."""
    for job_id in _due(draft.state.expiries, draft.now_ms):
        job = draft.job(job_id)
        if job is not None and not job.terminal:
            _end(
                draft,
                job,
                JobStatus.EXPIRED,
                Failure("expired", "The order's time was up before the job ended."),
                "expired",
            )


def end_hopeless(draft: Draft) -> None:
    """Once the sites have had time to speak: end what was queued before any was known, and none will ever take."""
    if not sites_are_known(draft.state, draft.now_ms):
        return
    for job_id in draft.state.unjudged:
        job = draft.job(job_id)
        if job is None or job.status is not JobStatus.QUEUED:
            continue
        problem = _never(draft, job)
        if problem is not None:
            _end(draft, job, JobStatus.FAILED, Failure(*problem), problem[0])


def sites_are_known(state: MeshState, now_ms: int) -> bool:
    """Whether the first site spoke long enough ago for the others to have spoken too."""
    return state.first_heard_at_ms is not None and now_ms - state.first_heard_at_ms >= state.policy.suspect_ms


def drop_expired(expiries: list[tuple[int, str]], now_ms: int) -> None:
    """Forget the heap's entries that `expire_orders` has dealt with."""
    while expiries and expiries[0][0] <= now_ms:
        heapq.heappop(expiries)


def _due(heap: list[tuple[int, JobId]], now_ms: int) -> list[JobId]:
    """Return what is due at the front of the heap, reading no more than that; `drop_expired` takes it away."""
    due, look = [], [0]
    while look:
        place = look.pop()
        if place < len(heap) and heap[place][0] <= now_ms:
            due.append(heap[place][1])
            look += (2 * place + 1, 2 * place + 2)
    return due


def _end(draft: Draft, job: JobRecord, status: JobStatus, failure: Failure, reason: str) -> JobRecord:
    attempt = draft.current_attempt(job)
    ended = draft.change_job(job, status=status, failure=failure, text=failure.text)
    if attempt is not None and not attempt.status.terminal:
        stop(draft, attempt, reason)
    return ended


def _problem(draft: Draft, order: Order, owner: KeyId) -> tuple[str, str] | None:
    now, policy = draft.now_ms, draft.state.policy
    if order.federation != draft.state.federation:
        return (
            "federation",
            f"The order is for the federation {order.federation!r}; this is {draft.state.federation!r}.",
        )
    if order.expires_at_ms <= now:
        return "expired", "The order had expired when it arrived. Submit it again."
    if order.expires_at_ms - order.issued_at_ms > 7 * 86_400_000:
        return "window", "An order may be valid for 7 days at most."
    if max(order.not_before_ms, order.issued_at_ms) > now + SKEW_MS:
        return "window", "The order is not valid yet. Check the clock of your machine."
    if order.max_attempts < 1:
        return "attempts", "An order must allow at least one attempt."
    asked = order.limits
    positive = (asked.wall_ms, asked.memory_bytes, asked.result_bytes, order.payload.size_bytes)
    if min(positive) <= 0 or min(asked.log_bytes, asked.cpu_ms) < 0:
        return "limits", "The limits and the size of the payload that an order states must be positive."
    wanted = order.results
    if wanted.compression not in COMPRESSIONS or wanted.wire_dtype not in WIRE_DTYPES or len(wanted.session) > 64:
        return "results", (
            f"The order wants its result with compression {wanted.compression[:20]!r} and wire dtype {wanted.wire_dtype[:20]!r}. "
            f"There are {', '.join(COMPRESSIONS)}, and {', '.join(filter(None, WIRE_DTYPES))}."
        )
    if wanted.seal_to and not (len(wanted.seal_to) == 64 and set(wanted.seal_to) <= set("0123456789abcdef")):
        return "results", "The order wants its result sealed to what is no X25519 key (64 hexadecimal digits)."
    if draft.state.store_full:
        return "store_full", draft.state.store_full
    if (problem := too_much_kept(draft.state, owner)) is not None:
        return problem
    if order.payload.codec not in CODECS:
        return "codec", f"The payload's form {order.payload.codec!r} is unknown here; nnsight 0.8 is needed."
    if _version(order.client.nnsight) < MIN_NNSIGHT:
        have = order.client.nnsight or "unknown"
        return "versions", f"Your nnsight is {have}; this mesh needs 0.8 or newer. Type: pip install -U 'nnsight>=0.8'"
    if order.payload.size_bytes > policy.max_payload_bytes:
        return "payload_too_large", (
            f"The payload has {order.payload.size_bytes / 1e6:,.1f} MB; {policy.max_payload_bytes / 1e6:,.1f} MB are allowed. "
            "Do not capture large tensors in the traced block; build them inside it."
        )
    return None


def _never(draft: Draft, job: JobRecord) -> tuple[str, str] | None:
    """Why no known site will ever take the job: code and text; None when one may, or when none is known."""
    verdicts = verdicts_for(draft, job)
    if not verdicts or not all(only_permanent(v) for v in verdicts):
        return None
    wanted, known = job.order.model.repo_id, {o.repo_id for s in draft.sites() for o in s.advert.models}
    if wanted not in known:
        offered = ", ".join(sorted(known)) or "none at all"
        return "unknown_model", f"No site of this mesh offers the model {wanted}. Offered are: {offered}."
    reasons = [r for v in verdicts for r in v.reasons]
    code = "too_large" if any(r.code == "too_large" for r in reasons) else reasons[0].code
    listed = " ".join(dict.fromkeys(r.text for r in reasons))
    return code, f"No site can run this job as it is ordered. {listed}"


def _refuse(draft: Draft, order: Order, code: str, text: str) -> None:
    draft.send(PublishRefusal(order.job, Refusal(Failure(code, text), order.job)))


def _unknown(job: str) -> Failure:
    return Failure("not_found", f"There is no job {job[:40]} of yours here.")


def _answer(draft: Draft, reply_to: str, message: Refusal | JobList | object) -> None:
    if reply_to:
        draft.send(Reply(reply_to, message))  # type: ignore[arg-type]


def _answer_job(draft: Draft, reply_to: str, job: JobRecord, *, explain: bool = False) -> None:
    _answer(draft, reply_to, snapshot(draft, job, explain=explain))


def _version(text: str) -> tuple[int, ...]:
    parts = text.split(".")[:2]
    return tuple(int(p) for p in parts) if len(parts) == 2 and all(p.isdigit() for p in parts) else (0, 0)
