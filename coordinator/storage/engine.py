"""Opening the database: SQLite in WAL mode with `synchronous=FULL` by default, PostgreSQL by URL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from coordinator.storage.errors import RecordError, RecordFullError
from edif_mesh.errors import ConfigError

BUSY_MS = 5_000
_FULL = ("disk is full", "disk full", "disk i/o error", "no space left", "quota exceeded")


def sqlite_path(url: str) -> Path | None:
    """Return the file of a SQLite URL, or None for another database; raises ConfigError for a URL of no use."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"database_url: {url[:80]!r} is no database URL; use sqlite:////absolute/file.db.") from error
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError(
            "database_url: SQLite in memory forgets everything; name a file: sqlite:////absolute/file.db."
        )
    return Path(parsed.database)


def open_engine(url: str) -> Engine:
    """Return an engine for `url`, with SQLite set up for durability; raises ConfigError."""
    path = sqlite_path(url)
    try:
        if path is None:
            return create_engine(url, pool_pre_ping=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": BUSY_MS / 1000, "check_same_thread": False})
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(f"database_url: no driver for this database is installed ({error}).") from error
    except OSError as error:
        raise ConfigError(f"database_url: the folder {path} cannot be made: {error.strerror}.") from error
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def transaction(engine: Engine, *, write: bool) -> Iterator[Connection]:
    """One transaction; a failure of the database becomes RecordError or RecordFullError and leaves nothing behind."""
    try:
        with engine.connect().execution_options(edif_write=write) as connection, connection.begin():
            yield connection
    except (DBAPIError, engine.dialect.loaded_dbapi.Error) as error:  # the second: of statements given to the driver
        text = str(getattr(error, "orig", None) or error)
        if any(sign in text.lower() for sign in _FULL):
            raise RecordFullError(
                f"The coordinator's record cannot be written: {text}. Nothing was lost; free space and it goes on."
            ) from error
        raise RecordError(f"The coordinator's record cannot be used now: {text[:200]}") from error


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves; the driver would begin too late for the term's check
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_MS}", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE takes the write lock before the term is read, so that no other writer can come between.
    write = connection.get_execution_options().get("edif_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
