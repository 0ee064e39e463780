"""A job: what a researcher asked for, until a terminal state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class JobStatus(StrEnum):
    """Where a job is; the last five are terminal and final."""

    QUEUED = "QUEUED"
    PLACED = "PLACED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"
    QUARANTINED = "QUARANTINED"

    @property
    def terminal(self) -> bool:
        """Whether the job has ended for ever."""
        return not JOB_TRANSITIONS[self]


_S = JobStatus
JOB_TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    _S.QUEUED: frozenset({_S.PLACED, _S.FAILED, _S.CANCELLED, _S.EXPIRED, _S.QUARANTINED}),
    _S.PLACED: frozenset({_S.RUNNING, _S.QUEUED, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED, _S.EXPIRED, _S.QUARANTINED}),
    _S.RUNNING: frozenset({_S.QUEUED, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED, _S.EXPIRED, _S.QUARANTINED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.EXPIRED: frozenset(),
    _S.QUARANTINED: frozenset(),
}
"""QUEUED again means: the attempt was lost, declined or released, and the next one waits for a site."""


class JobClass(StrEnum):
    """How a job queues: somebody waits for it, or nobody does."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one attempt may use; a site's policy may only lower them."""

    wall_ms: int = 600_000
    memory_bytes: int = 2 << 30
    """Memory of the runner beyond the shared weights."""
    result_bytes: int = 8 << 30
    log_bytes: int = 1 << 20
    """Of printed text; what is beyond is not shown, and the job goes on."""
    cpu_ms: int = 0
    """Processor time over all threads; 0 means `wall_ms` times the threads that the site gives a runner."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt or a job ended without a result: `code` for scripts, `text` for the person."""

    code: str
    text: str

    @property
    def line(self) -> str:
        """The one line that says most, of 300 characters at most: a traceback's last, a sentence's first; "" when there is none."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return (lines[-1 if self.code == "user_error" else 0] if lines else "")[:300]
