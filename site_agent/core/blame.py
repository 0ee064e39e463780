"""Whose fault a runner's end is; it decides whether another site tries the job."""

from __future__ import annotations

from edif_mesh.domain.attempt import Blame

_USER = frozenset(
    {
        "user_error",
        "bad_payload",
        "unsupported_value",
        "result_too_large",
        "wall_time",
        "cpu_time",
        "out_of_memory",
        "payload_too_large",
        "too_many_threads",
        "env",
    }
)
_RUNNER = frozenset({"runner_crashed", "protocol", "weights_changed"})
"""Every job that ran while shared weights changed is suspect: it runs again elsewhere, and a second time is once too often."""


def blame_of(code: str) -> Blame:
    """Return who is to blame for a runner that ended with `code`; a code that nobody knows is the site's fault."""
    if code in _USER:
        return Blame.USER
    return Blame.RUNNER if code in _RUNNER else Blame.SITE
