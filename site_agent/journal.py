"""The agent's durable memory: one SQLite file, written in one transaction a decision, before anything is sent or started.

It keeps what must survive a crash: the pairs seen, the highest epoch, which attempts were held, the last reports until
they are acknowledged, and the audit log (each line carries the digest of the one before, so that a deleted or altered
line shows). `synchronous=FULL` in WAL mode: a commit is on the disk when it returns.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from edif_mesh.domain.ids import AttemptNumber, Digest, Epoch, JobId
from edif_mesh.errors import SiteError, WireError
from edif_mesh.wire.codec import decode_as, encode
from edif_mesh.wire.messages import Report
from site_agent.core.changes import (
    AttemptBarred,
    AttemptEnded,
    AttemptOpened,
    Audited,
    Change,
    Durable,
    EpochRaised,
    OldForgotten,
    PairSeen,
    ReportSettled,
)
from site_agent.core.events import Orphan
from site_agent.core.state import AttemptKey, Pair

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (digest TEXT, attempt INTEGER, until_ms INTEGER, PRIMARY KEY (digest, attempt))
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS barred (job TEXT, attempt INTEGER, until_ms INTEGER, PRIMARY KEY (job, attempt))
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS held (job TEXT, attempt INTEGER, digest TEXT, epoch INTEGER, sequence INTEGER,
  PRIMARY KEY (job, attempt)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outbox (job TEXT, attempt INTEGER, sequence INTEGER, report BLOB, PRIMARY KEY (job, attempt))
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS audit (number INTEGER PRIMARY KEY, at_ms INTEGER, what TEXT, detail TEXT, digest TEXT);
"""
_FORMAT = 1
_MAX_DETAIL = 1_000


class JournalError(SiteError):
    """The journal cannot be read or written; nothing was started."""

    code = "journal"


@dataclass(frozen=True, slots=True)
class Remembered:
    """What an earlier run of the agent left."""

    epoch: Epoch
    seen: dict[Pair, int]
    barred: dict[AttemptKey, int]
    orphans: tuple[Orphan, ...]
    reports: tuple[Report, ...]


class Journal:
    """The open journal; `commit` may be called from any one thread at a time. One process has it open."""

    def __init__(self, path: Path) -> None:
        """Open or create the file at `path`. Raises JournalError: damaged, in use, of another format, no space."""
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1)
            # Exclusive: a second agent on the same state is refused at its first read.
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=4000"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            self._check_format()
            self._db.execute("COMMIT")
            row = self._db.execute("SELECT digest FROM audit ORDER BY number DESC LIMIT 1").fetchone()
        except (sqlite3.Error, OSError) as error:
            raise JournalError(self._sentence(error)) from error
        self._audit_digest: str = row[0] if row else ""

    def load(self) -> Remembered:
        """Return everything that is remembered. Raises JournalError."""
        try:
            epoch = self._db.execute("SELECT value FROM facts WHERE name = 'epoch'").fetchone()
            seen = self._db.execute("SELECT digest, attempt, until_ms FROM seen").fetchall()
            barred = self._db.execute("SELECT job, attempt, until_ms FROM barred").fetchall()
            held = self._db.execute("SELECT job, attempt, digest, epoch, sequence FROM held").fetchall()
            reports = self._db.execute("SELECT report FROM outbox").fetchall()
            return Remembered(
                epoch=Epoch(epoch[0] if epoch else 0),
                seen={(Digest(digest), AttemptNumber(attempt)): until for digest, attempt, until in seen},
                barred={(JobId(job), AttemptNumber(attempt)): until for job, attempt, until in barred},
                orphans=tuple(
                    Orphan((JobId(job), AttemptNumber(attempt)), Digest(digest), Epoch(term), sequence)
                    for job, attempt, digest, term, sequence in held
                ),
                reports=tuple(decode_as(Report, row[0]) for row in reports),
            )
        except (sqlite3.Error, WireError) as error:
            raise JournalError(self._sentence(error)) from error

    def commit(self, changes: Sequence[Change], now_ms: int) -> None:
        """Write the durable ones of `changes` in one transaction; on the disk on return. Raises JournalError."""
        durable = [change for change in changes if isinstance(change, Durable)]
        if not durable:
            return
        with self._lock:
            before = self._audit_digest
            try:
                self._db.execute("BEGIN IMMEDIATE")
                for change in durable:
                    self._write(change, now_ms)
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._audit_digest = before
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise JournalError(self._sentence(error)) from error

    def audit(self) -> list[tuple[int, int, str, str]]:
        """Return the audit log (number, instant, what, detail), checked. Raises JournalError when it was altered."""
        rows = self._db.execute("SELECT number, at_ms, what, detail, digest FROM audit ORDER BY number").fetchall()
        digest = ""
        for expected, (number, at_ms, what, detail, found) in enumerate(rows, 1):
            digest = _chain(digest, number, at_ms, what, detail)
            if number != expected or digest != found:
                raise JournalError(f"The audit log in {self._path} was altered at line {expected}.")
        return [row[:4] for row in rows]

    def close(self) -> None:
        """Close the file; idempotent."""
        self._db.close()

    def _write(self, change: Durable, now_ms: int) -> None:
        run = self._db.execute
        match change:
            case PairSeen((digest, attempt), until_ms):
                run("INSERT OR REPLACE INTO seen VALUES (?, ?, ?)", (digest, attempt, until_ms))
            case EpochRaised(epoch):
                run("INSERT OR REPLACE INTO facts VALUES ('epoch', ?)", (epoch,))
            case AttemptOpened(held):
                opened = (held.job, held.attempt, held.digest, held.epoch, held.sequence)
                run("INSERT OR REPLACE INTO held VALUES (?, ?, ?, ?, ?)", opened)
            case AttemptBarred((job, attempt), until_ms):
                run("INSERT OR REPLACE INTO barred VALUES (?, ?, ?)", (job, attempt, until_ms))
            case AttemptEnded(report):
                run("DELETE FROM held WHERE job = ? AND attempt = ?", (report.job, report.attempt))
                ended = (report.job, report.attempt, report.sequence, encode(report))
                run("INSERT OR REPLACE INTO outbox VALUES (?, ?, ?, ?)", ended)
            case ReportSettled((job, attempt), sequence):
                run("DELETE FROM outbox WHERE job = ? AND attempt = ? AND sequence <= ?", (job, attempt, sequence))
            case OldForgotten(before_ms):
                run("DELETE FROM seen WHERE until_ms < ?", (before_ms,))
                run("DELETE FROM barred WHERE until_ms < ?", (before_ms,))
            case Audited(what, detail):
                self._append(now_ms, what, detail[:_MAX_DETAIL])
            case _:
                assert_never(change)

    def _append(self, now_ms: int, what: str, detail: str) -> None:
        number = self._db.execute("SELECT coalesce(max(number), 0) + 1 FROM audit").fetchone()[0]
        self._audit_digest = _chain(self._audit_digest, number, now_ms, what, detail)
        self._db.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?)", (number, now_ms, what, detail, self._audit_digest))

    def _check_format(self) -> None:
        self._db.execute("INSERT OR IGNORE INTO facts VALUES ('format', ?)", (_FORMAT,))
        found = self._db.execute("SELECT value FROM facts WHERE name = 'format'").fetchone()[0]
        if found != _FORMAT:
            self._db.execute("ROLLBACK")
            raise JournalError(f"The journal {self._path} has format {found}; this release reads {_FORMAT}.")

    def _sentence(self, error: Exception) -> str:
        text = str(error)
        if "locked" in text:
            return f"The journal {self._path} is in use: another agent runs on this state folder. Stop it first."
        if "full" in text:
            return f"The disk of {self._path} is full; nothing was started. Make room there."
        return f"The journal {self._path} cannot be used: {text}. Nothing was started."


def _chain(before: str, number: int, at_ms: int, what: str, detail: str) -> str:
    return hashlib.sha256(f"{before}\0{number}\0{at_ms}\0{what}\0{detail}".encode("utf-8", "replace")).hexdigest()
