"""The store: one guarded transaction a decision (or a batch of them), and what recovery and queries read back.

Blocking; the shell calls it in a thread of its own. One writer, any number of readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, cast

from sqlalchemy import Connection, Engine, Select, Table, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import SQLModel

from coordinator.storage.engine import open_engine, transaction
from coordinator.storage.errors import LostLeadershipError, StaleRecordError
from coordinator.storage.migrations import migrate
from coordinator.storage.recording import AuditLine, Recording, StoredAttempt, StoredJob, StoredOrder, StoredSite
from coordinator.storage.rows import AttemptRow, AuditRow, JobRow, OrderRow, SiteRow, TermRow
from edif_mesh.domain.ids import Digest, Epoch, JobId, KeyId, SiteId

_PAGE = 500
_JOB_CHANGES = ("version", "status", "terminal", "updated_at_ms", "record")


class Store:
    """The coordinator's record in one database."""

    def __init__(self, url: str) -> None:
        """Open `url` and bring its schema up to date; raises ConfigError, RecordError."""
        self._engine = open_engine(url)
        self._sqlite = self._engine.dialect.name == "sqlite"
        insert: Any = sqlite.insert if self._sqlite else postgresql.insert
        engine, changed = self._engine, ("status", "active", "record")
        self._put_job = Write(_upsert(insert, JobRow, ("job",), _JOB_CHANGES, guarded=True), StoredJob, engine)
        self._put_attempt = Write(_upsert(insert, AttemptRow, ("job", "attempt"), changed), StoredAttempt, engine)
        self._put_site = Write(_upsert(insert, SiteRow, ("site",), ("record",)), StoredSite, engine)
        self._put_order = Write(insert(_table(OrderRow)).on_conflict_do_nothing(), StoredOrder, engine)
        self._add_audit = Write(_table(AuditRow).insert(), AuditLine, engine, without="number")
        ask = select(_table(TermRow).c.epoch)
        # SQLite holds its write lock already.
        self._ask_term = str((ask if self._sqlite else ask.with_for_update()).compile(dialect=engine.dialect))
        with transaction(self._engine, write=True) as connection:
            migrate(connection)

    def close(self) -> None:
        """Close all connections; idempotent."""
        self._engine.dispose()

    # ------------------------------------------------------------------------------------------------- writing

    def begin_term(self, now_ms: int, holder: str) -> Epoch:
        """Raise the epoch by one and return it: from here on no older term can write."""
        with transaction(self._engine, write=True) as connection:
            term = _table(TermRow)
            connection.execute(update(term).values(epoch=term.c.epoch + 1, began_at_ms=now_ms, holder=holder))
            return Epoch(int(connection.execute(select(term.c.epoch)).scalar_one()))

    def apply(self, recording: Recording) -> None:
        """Write all of `recording`, or nothing.

        Raises:
            LostLeadershipError: a newer term has begun.
            StaleRecordError: a job's stored version is not older than the given one.
            RecordFullError, RecordError: the database cannot be written now; the same recording may be tried again.
        """
        with transaction(self._engine, write=True) as connection:
            self._check_term(connection, recording.epoch)
            cursor = connection.connection.cursor()
            for job in recording.jobs:
                if self._put_job.run(cursor, [job]) == 0:
                    raise StaleRecordError(f"{job.job}: version {job.version} is not newer than the recorded one.")
            self._put_attempt.run(cursor, recording.attempts)
            self._put_site.run(cursor, recording.sites)
            self._put_order.run(cursor, recording.orders)
            self._add_audit.run(cursor, [replace(line, epoch=recording.epoch) for line in recording.audit])
            cursor.close()

    def probe(self, epoch: Epoch) -> None:
        """Write nothing new, but durably: shows that the record can be written (errors as `apply`)."""
        with transaction(self._engine, write=True) as connection:
            self._check_term(connection, epoch)
            connection.execute(update(_table(TermRow)).values(epoch=epoch))

    def _check_term(self, connection: Connection, epoch: Epoch) -> None:
        found = int(connection.exec_driver_sql(self._ask_term).scalar_one())
        if found != epoch:
            raise LostLeadershipError(epoch, found)

    # ------------------------------------------------------------------------------------------------- reading

    def epoch(self) -> Epoch:
        """Return the term that may write; 0 before the first."""
        return Epoch(int(self._rows(select(_table(TermRow).c.epoch))[0][0]))

    def open_jobs(self) -> Iterator[StoredJob]:
        """Yield every job that has not ended, oldest first, in pages: what recovery needs."""
        table, after = _table(JobRow), ""
        while True:
            query = select(table).where(table.c.terminal.is_(False), table.c.job > after)
            rows = self._rows(query.order_by(table.c.job).limit(_PAGE))
            yield from (_job(row) for row in rows)
            if len(rows) < _PAGE:
                return
            after = rows[-1].job

    def recent_ended_jobs(self, limit: int) -> list[StoredJob]:
        """Return the jobs that ended last, newest first."""
        table = _table(JobRow)
        query = select(table).where(table.c.terminal.is_(True)).order_by(table.c.updated_at_ms.desc()).limit(limit)
        return [_job(row) for row in self._rows(query)]

    def ended_since(self, since_ms: int) -> Iterator[StoredJob]:
        """Yield the jobs that have ended or changed since, oldest first, in pages: their results may be kept."""
        table, after = _table(JobRow), (since_ms, "")
        while True:
            later = (table.c.updated_at_ms > after[0]) | (
                (table.c.updated_at_ms == after[0]) & (table.c.job > after[1])
            )
            query = select(table).where(table.c.terminal.is_(True), later)
            rows = self._rows(query.order_by(table.c.updated_at_ms, table.c.job).limit(_PAGE))
            yield from (_job(row) for row in rows)
            if len(rows) < _PAGE:
                return
            after = (rows[-1].updated_at_ms, rows[-1].job)

    def job(self, job: JobId) -> StoredJob | None:
        """Return one job, or None."""
        table = _table(JobRow)
        rows = self._rows(select(table).where(table.c.job == job))
        return _job(rows[0]) if rows else None

    def jobs(
        self, *, owner: KeyId | None = None, status: str | None = None, limit: int = 50, offset: int = 0
    ) -> list[StoredJob]:
        """Return jobs, newest first."""
        table = _table(JobRow)
        query = select(table).order_by(table.c.submitted_at_ms.desc(), table.c.job.desc()).limit(limit).offset(offset)
        if owner is not None:
            query = query.where(table.c.owner == owner)
        if status is not None:
            query = query.where(table.c.status == status)
        return [_job(row) for row in self._rows(query)]

    def count_jobs(self) -> dict[str, int]:
        """Return how many jobs each status has."""
        table = _table(JobRow)
        query = select(table.c.status, func.count()).group_by(table.c.status)
        return {str(status): int(count) for status, count in self._rows(query)}

    def attempts(self, jobs: Sequence[JobId]) -> list[StoredAttempt]:
        """Return all attempts of `jobs`."""
        table = _table(AttemptRow)
        return [_attempt(row) for row in self._of_jobs(table, jobs)]

    def jobs_with_active_attempts(self) -> list[StoredJob]:
        """Return the ended jobs of which an attempt may still run: it has to be stopped."""
        jobs, attempts = _table(JobRow), _table(AttemptRow)
        active = select(attempts.c.job).where(attempts.c.active.is_(True))
        query = select(jobs).where(jobs.c.terminal.is_(True), jobs.c.job.in_(active))
        return [_job(row) for row in self._rows(query)]

    def orders(self, jobs: Sequence[JobId]) -> dict[JobId, StoredOrder]:
        """Return the orders of `jobs` that are recorded."""
        rows = self._of_jobs(_table(OrderRow), jobs)
        return {JobId(row.job): StoredOrder(JobId(row.job), Digest(row.digest), row.envelope) for row in rows}

    def _of_jobs(self, table: Table, jobs: Sequence[JobId]) -> Iterator[Any]:
        for first in range(0, len(jobs), _PAGE):
            yield from self._rows(select(table).where(table.c.job.in_(jobs[first : first + _PAGE])))

    def sites(self) -> list[StoredSite]:
        """Return all recorded sites."""
        return [StoredSite(SiteId(row.site), row.record) for row in self._rows(select(_table(SiteRow)))]

    def audit(self, *, before: int | None = None, job: JobId | None = None, limit: int = 100) -> list[AuditLine]:
        """Return recorded changes, newest first, older than number `before`."""
        table = _table(AuditRow)
        query = select(table).order_by(table.c.number.desc()).limit(limit)
        if before is not None:
            query = query.where(table.c.number < before)
        if job is not None:
            query = query.where(table.c.job == job)
        return [_line(row) for row in self._rows(query)]

    def _rows(self, query: Select[Any]) -> Sequence[Any]:
        with transaction(self._engine, write=False) as connection:
            return connection.execute(query).all()


class Write:
    """A statement that writes values of one class, compiled once: it goes to the driver as text, without SQLAlchemy's
    work for every call."""

    def __init__(self, statement: Any, kind: type[Any], engine: Engine, *, without: str = "") -> None:
        fields = [name for name in kind.__dataclass_fields__ if name != without]
        compiled = statement.compile(dialect=engine.dialect, column_keys=fields)
        self._text = str(compiled)
        self._names: list[str] | None = compiled.positiontup
        self._fields = fields
        self._values = attrgetter(*(self._names or fields))

    def run(self, cursor: Any, items: Sequence[Any]) -> int:
        """Write `items` and return how many rows the driver says were written."""
        if not items:
            return 0
        rows = [self._values(item) for item in items]
        named = self._names is None
        cursor.executemany(self._text, [dict(zip(self._fields, row, strict=True)) for row in rows] if named else rows)
        return int(cursor.rowcount)


def _upsert(
    insert: Any, row: type[SQLModel], key: tuple[str, ...], changes: tuple[str, ...], *, guarded: bool = False
) -> Any:
    """Return insert-or-replace; `guarded` replaces only an older version."""
    table = _table(row)
    statement = insert(table)
    return statement.on_conflict_do_update(
        index_elements=list(key),
        set_={name: statement.excluded[name] for name in changes},
        where=table.c.version < statement.excluded.version if guarded else None,
    )


def _table(row: type[SQLModel]) -> Table:
    return cast(Table, row.__table__)  # type: ignore[attr-defined]


def _job(row: Any) -> StoredJob:
    return StoredJob(**{name: getattr(row, name) for name in StoredJob.__dataclass_fields__})


def _attempt(row: Any) -> StoredAttempt:
    return StoredAttempt(**{name: getattr(row, name) for name in StoredAttempt.__dataclass_fields__})


def _line(row: Any) -> AuditLine:
    return AuditLine(**{name: getattr(row, name) for name in AuditLine.__dataclass_fields__})
