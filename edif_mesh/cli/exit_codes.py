"""What `edif` exits with, for scripts."""

from __future__ import annotations

from edif_mesh.errors import (
    ConfigError,
    EdifError,
    JobError,
    NotFoundError,
    RefusedError,
    ResultError,
    StoreFullError,
    TransportError,
)

OK = 0
FAILED = 1
"""The job ended without a result, or something unexpected happened."""
USAGE = 2
"""The command or a setting is wrong."""
UNREACHABLE = 3
"""The broker or the coordinator does not answer."""
NOT_FOUND = 4
"""No such job, model, site or running mesh."""
REFUSED = 5
"""The mesh refused it and said why."""
BAD_RESULT = 6
"""A result is missing, or is not what its site signed."""


def exit_code(error: EdifError) -> int:
    """Return the exit code of an error."""
    table: list[tuple[type[EdifError], int]] = [
        (NotFoundError, NOT_FOUND),
        (RefusedError, REFUSED),
        (ResultError, BAD_RESULT),
        (StoreFullError, FAILED),
        (TransportError, UNREACHABLE),
        (ConfigError, USAGE),
        (JobError, FAILED),
    ]
    return next((code for kind, code in table if isinstance(error, kind)), FAILED)
