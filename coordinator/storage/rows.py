"""The tables. `record` holds a whole value of the core as JSON; the other columns are only what queries need.

Instants are Unix milliseconds UTC and need 64 bits, hence `BigInteger`; SQLite's own key stays a plain integer.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, Text
from sqlmodel import Field, SQLModel

SCHEMA_VERSION = 1
"""The schema these tables describe; see `migrations`."""


class SchemaRow(SQLModel, table=True):
    """One row: the version of the schema in this database."""

    __tablename__ = "edif_schema"
    id: int = Field(primary_key=True)
    version: int


class TermRow(SQLModel, table=True):
    """One row: the epoch of the coordinator that may write. Every transaction checks it."""

    __tablename__ = "edif_term"
    id: int = Field(primary_key=True)
    epoch: int = Field(sa_column=Column(BigInteger, nullable=False))
    began_at_ms: int = Field(sa_column=Column(BigInteger, nullable=False))
    holder: str = ""


class JobRow(SQLModel, table=True):
    """One job as it is now."""

    __tablename__ = "edif_job"
    __table_args__ = (
        Index("edif_job_owner", "owner", "submitted_at_ms"),
        Index("edif_job_submitted", "submitted_at_ms"),
        Index("edif_job_terminal", "terminal", "updated_at_ms"),
    )
    job: str = Field(primary_key=True)
    version: int = Field(sa_column=Column(BigInteger, nullable=False))
    status: str
    terminal: bool
    owner: str
    model: str
    submitted_at_ms: int = Field(sa_column=Column(BigInteger, nullable=False))
    updated_at_ms: int = Field(sa_column=Column(BigInteger, nullable=False))
    record: str = Field(sa_column=Column(Text, nullable=False))


class AttemptRow(SQLModel, table=True):
    """One attempt as it is now. `active` means that it may still run, or has still to be stopped."""

    __tablename__ = "edif_attempt"
    __table_args__ = (Index("edif_attempt_site", "site"), Index("edif_attempt_active", "active"))
    job: str = Field(primary_key=True)
    attempt: int = Field(primary_key=True)
    site: str
    status: str
    active: bool
    granted_at_ms: int = Field(sa_column=Column(BigInteger, nullable=False))
    record: str = Field(sa_column=Column(Text, nullable=False))


class OrderRow(SQLModel, table=True):
    """The exact envelope text of an order: what the researcher signed, byte for byte. Written once."""

    __tablename__ = "edif_order"
    job: str = Field(primary_key=True)
    digest: str
    envelope: str = Field(sa_column=Column(Text, nullable=False))


class SiteRow(SQLModel, table=True):
    """One site as it was last recorded."""

    __tablename__ = "edif_site"
    site: str = Field(primary_key=True)
    record: str = Field(sa_column=Column(Text, nullable=False))


class AuditRow(SQLModel, table=True):
    """One recorded change, in order; never updated, never deleted."""

    __tablename__ = "edif_audit"
    __table_args__ = (Index("edif_audit_job", "job"),)
    number: int | None = Field(
        default=None,
        sa_column=Column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    )
    at_ms: int = Field(sa_column=Column(BigInteger, nullable=False))
    epoch: int = Field(sa_column=Column(BigInteger, nullable=False))
    what: str
    job: str | None = None
    attempt: int | None = None
    site: str | None = None
    text: str = Field(sa_column=Column(Text, nullable=False))
