"""The index of a result: one entry a chunk, 48 bytes each; its SHA-256 is the root that the site signs.

A chunk is a piece of the archive of at most `CHUNK_BYTES`, in the form in which it travels: as it is, compressed or
sealed. Chunks follow each other without gaps, so the entries say where each begins.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from edif_mesh.domain.ids import Digest
from edif_mesh.errors import ManifestError

CHUNK_BYTES = 960 << 10
"""The most of an archive in one chunk, a multiple of 64. Every chunk costs the broker one flush to disk, so it is nearly as
large as the broker's `max_payload` of 1 MiB allows."""
MAX_STORED_BYTES = CHUNK_BYTES + 64
"""The most bytes of a chunk as it travels: a form that grows more is not used."""
MAX_ENTRIES = 1 << 22
ENTRY = struct.Struct("<IIBBHI32s")
OWN = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One chunk: what it takes in the archive, and how it travels."""

    plain_bytes: int
    stored_bytes: int
    form: int
    """See `codec.py`: 0 as it is."""
    element: int
    """Bytes of one number of the values inside, for the byte planes of `codec.py`; 0 where none were split."""
    lender: int
    """0: this attempt's own chunk; n: stored by the manifest's n-th lender."""
    number: int
    """The chunk's number at whoever stored it."""
    digest: bytes
    """SHA-256 of the chunk as it travels, 32 bytes."""

    def pack(self) -> bytes:
        """Return the entry's 48 bytes."""
        return ENTRY.pack(
            self.plain_bytes, self.stored_bytes, self.form, self.element, self.lender, self.number, self.digest
        )


class Index:
    """The entries of one archive, and where each chunk begins in it."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self.starts = (0, *itertools.accumulate(entry.plain_bytes for entry in self.entries))
        """Offset of each chunk in the archive, and last the archive's end."""

    def __len__(self) -> int:
        return len(self.entries)

    def pack(self) -> bytes:
        """Return all entries as they are signed."""
        return b"".join(entry.pack() for entry in self.entries)

    def covering(self, start: int, stop: int) -> range:
        """Return the numbers of the chunks that hold the archive's bytes `start` to `stop` (at least one byte)."""
        first = bisect.bisect_right(self.starts, start) - 1
        return range(first, bisect.bisect_left(self.starts, stop, first))

    @property
    def archive_bytes(self) -> int:
        """The archive's size."""
        return self.starts[-1]

    @property
    def stored_bytes(self) -> int:
        """What this attempt itself has stored."""
        return sum(entry.stored_bytes for entry in self.entries if entry.lender == OWN)


def unpack_entries(raw: bytes | bytearray | memoryview) -> list[Entry]:
    """Return the entries in `raw`; raises ManifestError for a length, size or form that cannot be."""
    if len(raw) % ENTRY.size or len(raw) > MAX_ENTRIES * ENTRY.size:
        raise ManifestError(f"An index of {len(raw)} bytes cannot be: an entry has {ENTRY.size}.")
    entries = [Entry(*fields) for fields in ENTRY.iter_unpack(raw)]
    for number, entry in enumerate(entries):
        if not (0 < entry.plain_bytes <= CHUNK_BYTES and 0 < entry.stored_bytes <= MAX_STORED_BYTES):
            raise ManifestError(
                f"The index gives chunk {number} {entry.plain_bytes} bytes; at most {CHUNK_BYTES} can be."
            )
    return entries


def root_of(raw: bytes) -> Digest:
    """Return what the site signs of a packed index."""
    return Digest(hashlib.sha256(raw).hexdigest())
