"""What can go wrong with the record, as sentences for an operator."""

from __future__ import annotations

from edif_mesh.errors import EdifError


class RecordError(EdifError):
    """The record could not be written or read now; nothing was half written. The caller tries again."""

    code = "record"


class RecordFullError(RecordError):
    """The disk (or the database's own limit) is full; nothing was written."""

    code = "record_full"


class LostLeadershipError(EdifError):
    """Another coordinator has begun a newer term: this one must write nothing more and end."""

    code = "lost_leadership"

    def __init__(self, ours: int, found: int) -> None:
        self.ours, self.found = ours, found
        super().__init__(f"Term {found} has begun elsewhere; this coordinator of term {ours} writes no more and ends.")


class StaleRecordError(EdifError):
    """A job would have been overwritten by an older version of itself: a programming error, and nothing was written."""

    code = "stale_record"
