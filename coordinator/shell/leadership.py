"""Who leads: one coordinator a database. The epoch in the record is the truth; the file lock is a friendly refusal.

With SQLite the lock is a file beside the database, held until the process ends, however it ends. With PostgreSQL the
epoch alone decides: a second coordinator begins a newer term, and the first one ends at its next write.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from coordinator.storage.engine import sqlite_path
from edif_mesh.errors import ConfigError


class Leadership:
    """The right to write to one database, as far as this machine can tell."""

    def __init__(self, database_url: str) -> None:
        """Take the lock; raises ConfigError when another coordinator holds it."""
        path = sqlite_path(database_url)
        self._file = None if path is None else _lock(path.with_name(path.name + ".lock"))
        self.holder = f"{socket.gethostname()[:60]}:{os.getpid()}"

    def release(self) -> None:
        """Let another coordinator lead; idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lock(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (held for the life of the process)
    except OSError as error:
        raise ConfigError(f"database_url: {path} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read(20).strip() or "unknown"
        file.close()
        raise ConfigError(
            f"Another coordinator (process {holder}) already leads with this database; end it first."
        ) from error
    with contextlib.suppress(OSError):  # on a full disk the lock still holds, only the number is missing
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file
