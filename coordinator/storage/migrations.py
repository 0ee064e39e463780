"""The schema's history: a numbered list. A database that is newer than this release is refused, never guessed at."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, inspect, select, update
from sqlmodel import SQLModel

from coordinator.storage.rows import SCHEMA_VERSION, AuditRow, SchemaRow, TermRow
from edif_mesh.errors import ConfigError

Step = Callable[[Connection], None]


def _first(connection: Connection) -> None:
    SQLModel.metadata.create_all(connection)


STEPS: dict[int, Step] = {1: _first}
"""Step N brings a database from version N - 1 to N; a released step is never edited."""


def migrate(connection: Connection) -> None:
    """Bring the database to `SCHEMA_VERSION`; raises ConfigError when it is newer. Call inside a transaction."""
    found = _version(connection)
    if found > SCHEMA_VERSION:
        raise ConfigError(
            f"This database has schema {found}; this release knows schemas up to {SCHEMA_VERSION}. "
            "Start the newer release, or restore the backup made before the upgrade."
        )
    for number in range(found + 1, SCHEMA_VERSION + 1):
        STEPS[number](connection)
    if found == 0:
        connection.execute(SchemaRow.__table__.insert().values(id=1, version=SCHEMA_VERSION))  # type: ignore[attr-defined]
        connection.execute(TermRow.__table__.insert().values(id=1, epoch=0, began_at_ms=0, holder=""))  # type: ignore[attr-defined]
    elif found < SCHEMA_VERSION:
        connection.execute(update(SchemaRow).values(version=SCHEMA_VERSION))


def _version(connection: Connection) -> int:
    tables = set(inspect(connection).get_table_names())
    if str(SchemaRow.__tablename__) not in tables:
        if str(AuditRow.__tablename__) in tables:
            raise ConfigError("This database holds tables of ours but no schema version: it is damaged.")
        return 0
    version = connection.execute(select(SchemaRow.version)).scalar_one_or_none()  # type: ignore[call-overload]
    return int(version or 0)
