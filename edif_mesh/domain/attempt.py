"""An attempt: one try of a job at one site."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class AttemptStatus(StrEnum):
    """Where an attempt is; the last six are terminal and final."""

    GRANTED = "GRANTED"
    ACCEPTED = "ACCEPTED"
    LOADING = "LOADING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    DECLINED = "DECLINED"
    LOST = "LOST"
    CANCELLED = "CANCELLED"
    RELEASED = "RELEASED"

    @property
    def terminal(self) -> bool:
        """Whether the attempt has ended for ever."""
        return not ATTEMPT_TRANSITIONS[self]


_S = AttemptStatus
_ENDS = frozenset({_S.SUCCEEDED, _S.FAILED, _S.LOST, _S.CANCELLED, _S.RELEASED})
ATTEMPT_TRANSITIONS: dict[AttemptStatus, frozenset[AttemptStatus]] = {
    _S.GRANTED: _ENDS | {_S.ACCEPTED, _S.LOADING, _S.RUNNING, _S.DECLINED},
    _S.ACCEPTED: _ENDS | {_S.LOADING, _S.RUNNING, _S.DECLINED},
    _S.LOADING: _ENDS | {_S.RUNNING},
    _S.RUNNING: _ENDS,
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.DECLINED: frozenset(),
    _S.LOST: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.RELEASED: frozenset(),
}


class Blame(StrEnum):
    """Whose fault a failed attempt is; it decides what happens next."""

    USER = "user"
    """The traced code or its limits: the job fails, no other site tries it."""
    RUNNER = "runner"
    """The runner died without a word: tried elsewhere; twice at two sites is quarantine."""
    SITE = "site"
    """The site's machinery (host lost, load failed, store full): tried elsewhere."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one attempt used, as the kernel of the site counted it; never the word of the code that ran."""

    wall_ms: int = 0
    """From the payload's arrival in the runner to its end."""
    cpu_ms: int = 0
    """Of all threads."""
    peak_memory_bytes: int = 0
    """Private memory of the runner at its highest, without the shared weights."""
    result_bytes: int = 0
    device: str = ""
    log_bytes: int = 0
    """Printed text."""
    sandbox: str = ""
    """The confinement profile it ran under."""
    load_ms: int = 0
    """How long the model took to load, when this attempt had to wait for that; else 0."""
    device_memory_bytes: int = 0
    """GPU memory at its highest, without the shared weights; 0 on a CPU."""
