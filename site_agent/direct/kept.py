"""The files of one kept result, and reading them: `JOB.ATTEMPT.data` and, once it is finished, `JOB.ATTEMPT.index`.

The data file holds the attempt's own chunks as they travel, in the order in which they were made. The index file begins
with a line of JSON (`owner`, `chunks`), then come the packed index and 8 bytes a chunk: where it lies in the data.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edif_mesh.domain.ids import AttemptNumber, JobId, KeyId
from edif_mesh.errors import NotFoundError, ResultError
from edif_mesh.results.index import ENTRY, Index, unpack_entries

NOWHERE = (1 << 64) - 1
"""The place of a chunk that another attempt holds."""
_HEAD_BYTES = 1024


def data_file(folder: Path, job: JobId, attempt: AttemptNumber) -> Path:
    """Where the chunks lie."""
    return folder / f"{job}.{attempt}.data"


def index_file(folder: Path, job: JobId, attempt: AttemptNumber) -> Path:
    """What is there only once the result is finished."""
    return folder / f"{job}.{attempt}.index"


def packed_index(owner: KeyId, index: Index, places: Iterable[int]) -> bytes:
    """Return the content of an index file."""
    head = json.dumps({"owner": owner, "chunks": len(index)}).encode() + b"\n"
    return head + index.pack() + b"".join(struct.pack("<Q", place) for place in places)


@dataclass(frozen=True, slots=True)
class KeptResult:
    """One finished result."""

    owner: KeyId
    index: bytes
    """Packed."""
    sizes: tuple[int, ...]
    places: tuple[int, ...]
    data: mmap.mmap

    @classmethod
    def open(cls, folder: Path, job: JobId, attempt: AttemptNumber) -> KeptResult:
        """Open what is kept of this attempt; raises NotFoundError when that is nothing whole."""
        try:
            head, _, rest = index_file(folder, job, attempt).read_bytes().partition(b"\n")
            value = json.loads(head[:_HEAD_BYTES])
            owner, chunks = KeyId(str(value["owner"])), int(value["chunks"])
            if len(rest) != chunks * (ENTRY.size + 8):
                raise ValueError("its length")
            raw = rest[: chunks * ENTRY.size]
            sizes = tuple(entry.stored_bytes for entry in unpack_entries(raw))
            places = struct.unpack(f"<{chunks}Q", rest[len(raw) :])
            file = os.open(data_file(folder, job, attempt), os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(file)
            if any(place != NOWHERE and place + size > len(data) for place, size in zip(places, sizes, strict=True)):
                raise ValueError("its places")
        except (OSError, ValueError, KeyError, TypeError, ResultError) as error:
            raise NotFoundError(f"Attempt {attempt} of {job} is not kept here.") from error
        return cls(owner, raw, sizes, places, data)

    def spans(self, numbers: Iterable[int]) -> list[memoryview]:
        """Return the chunks' bytes one after another, neighbours in one piece.

        Raises NotFoundError for a number that is none of the attempt's own.
        """
        found: list[tuple[int, int]] = []
        for number in numbers:
            if not 0 <= number < len(self.sizes) or self.places[number] == NOWHERE:
                raise NotFoundError(f"There is no chunk {number} of this attempt's own.")
            start, end = self.places[number], self.places[number] + self.sizes[number]
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        view = memoryview(self.data)
        return [view[start:end] for start, end in found]
