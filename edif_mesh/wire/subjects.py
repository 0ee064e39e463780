"""The only builder and parser of NATS subjects and stream names, and who may publish what.

A subject is an address, never a proof of origin: the server does not check reply subjects. Signatures prove origin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edif_mesh.domain.ids import AttemptNumber, JobId, KeyId, SiteId

ROOT = "edif.v1"

# Streams (JetStream, file store, `discard: new`, `max_bytes` set): name, subjects.
ORDERS_STREAM = "EDIF_ORDERS"
PAYLOADS_STREAM = "EDIF_PAYLOADS"
RESULTS_STREAM = "EDIF_RESULTS"
LOGS_STREAM = "EDIF_LOGS"


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """What a stream holds and keeps; `max_bytes` is set by configuration."""

    name: str
    subject: str
    max_age_ms: int
    one_message_a_subject: bool
    """A chunk can be written once and never overwritten (`discard_new_per_subject`)."""
    work_queue: bool = False


DAY_MS = 86_400_000
STREAMS: tuple[StreamSpec, ...] = (
    StreamSpec(ORDERS_STREAM, f"{ROOT}.order.*", 7 * DAY_MS, one_message_a_subject=False, work_queue=True),
    StreamSpec(PAYLOADS_STREAM, f"{ROOT}.payload.*.*", 8 * DAY_MS, one_message_a_subject=True),
    StreamSpec(RESULTS_STREAM, f"{ROOT}.result.*.*.*", 7 * DAY_MS, one_message_a_subject=True),
    StreamSpec(LOGS_STREAM, f"{ROOT}.log.*.*", 7 * DAY_MS, one_message_a_subject=False),
)


def streams(keep_ms: int) -> tuple[StreamSpec, ...]:
    """Return the streams where results and printed lines are kept for `keep_ms`."""
    kept = (RESULTS_STREAM, LOGS_STREAM)
    return tuple(replace(spec, max_age_ms=keep_ms) if spec.name in kept else spec for spec in STREAMS)


def order(key: KeyId) -> str:
    """Where a researcher publishes orders (durable)."""
    return f"{ROOT}.order.{key}"


def ask() -> str:
    """Where a researcher sends requests (`AskJob`, `AskJobs`, `AskMesh`, `CancelJob`) to the leading coordinator."""
    return f"{ROOT}.ask"


def job_updates(job: JobId) -> str:
    """Where the coordinator publishes every new `JobSnapshot` (or the `Refusal`) of a job."""
    return f"{ROOT}.job.{job}.update"


def payload_chunk(job: JobId, number: int) -> str:
    """One chunk of a job's payload (durable, written once)."""
    return f"{ROOT}.payload.{job}.{number}"


def payload_chunks(job: JobId) -> str:
    """All chunks of a job's payload."""
    return f"{ROOT}.payload.{job}.*"


def result_chunk(job: JobId, attempt: AttemptNumber, name: int | str) -> str:
    """One chunk of an attempt's result, by number, or `index` (durable, written once)."""
    return f"{ROOT}.result.{job}.{attempt}.{name}"


def result_chunks(job: JobId, attempt: AttemptNumber | None = None) -> str:
    """All chunks of one attempt's result, or of all attempts of the job."""
    return f"{ROOT}.result.{job}.{'*' if attempt is None else attempt}.*"


def log_lines(job: JobId, attempt: AttemptNumber) -> str:
    """Where a site publishes the lines that an attempt prints (durable)."""
    return f"{ROOT}.log.{job}.{attempt}"


def all_log_lines(job: JobId) -> str:
    """The lines of all attempts of a job."""
    return f"{ROOT}.log.{job}.*"


def site_orders(site: SiteId) -> str:
    """Where the coordinator sends `PlaceAttempt` and `StopAttempt` to one site (request-reply)."""
    return f"{ROOT}.site.{site}.do"


def advert(site: SiteId) -> str:
    """Where a site sends its `Advert` (request-reply with `LeaseRenewed`)."""
    return f"{ROOT}.site.{site}.advert"


def report(site: SiteId) -> str:
    """Where a site sends a `Report` (request-reply with `ReportReceived`)."""
    return f"{ROOT}.site.{site}.report"


ALL_ORDERS = f"{ROOT}.order.*"
ALL_ADVERTS = f"{ROOT}.site.*.advert"
ALL_REPORTS = f"{ROOT}.site.*.report"


@dataclass(frozen=True, slots=True)
class ResultAddress:
    """A parsed result subject."""

    job: JobId
    attempt: AttemptNumber
    name: str


def parse_result(subject: str) -> ResultAddress | None:
    """Return the parts of a result chunk's subject, or None when it is not one."""
    parts = subject.split(".")
    if len(parts) != 6 or ".".join(parts[:3]) != f"{ROOT}.result" or not parts[4].isdigit():
        return None
    return ResultAddress(JobId(parts[3]), AttemptNumber(int(parts[4])), parts[5])
