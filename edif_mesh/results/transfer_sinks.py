"""Where a result goes as it arrives: into memory, or into a file that a later process can go on with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.errors import ManifestError, ResultError, StoreFullError
from edif_mesh.results.index import CHUNK_BYTES, Entry, unpack_entries


class Sink(Protocol):
    """Takes chunks in any order, each once it was checked; called from one thread at a time."""

    in_memory: bool
    """Whether no call waits for a disk."""

    def begin(self, job: JobId, attempt: AttemptNumber) -> dict[int, Entry]:
        """Make ready for this attempt's archive; return what of it is there already, by number.

        The bytes of these were proven to be those that came for the entry; whether the entry is the result's is the
        caller's to say.
        """

    def place(self, number: int, start: int, entry: Entry, data: memoryview) -> None:
        """Put one chunk at its offset in the archive."""

    def read(self, start: int, size: int) -> bytes:
        """Return bytes that were placed before."""

    def finish(self, archive_bytes: int) -> None:
        """All is there."""

    def close(self) -> None:
        """Stop, keeping what is there; idempotent."""


class BufferSink:
    """Memory that grows with what comes; `data` is the archive once the read has returned.

    With `spill` a result of more than `memory_bytes` lies in a file without a name in that folder instead, and `data` is a
    private map of it: its pages come and go as they are used.
    """

    def __init__(self, spill: Path | None = None, memory_bytes: int = 1 << 30) -> None:
        self.data = memoryview(b"")
        self._spill, self._memory_bytes = spill, memory_bytes
        self._file = -1
        self.in_memory = True

    def begin(self, job: JobId, attempt: AttemptNumber) -> dict[int, Entry]:
        """Begin with nothing."""
        self.close()
        self._file, self.in_memory = _anonymous_file(), True
        return {}

    def place(self, number: int, start: int, entry: Entry, data: memoryview) -> None:
        """Copy one chunk to its place; raises StoreFullError when it is a file and its disk is full."""
        if self.in_memory and self._spill is not None and start + len(data) > self._memory_bytes:
            self._to_disk(self._spill)
        try:
            _write(self._file, start, data)
        except OSError as error:
            raise StoreFullError(f"The result cannot be kept in {self._spill}: {error.strerror}.") from error

    def read(self, start: int, size: int) -> bytes:
        """Return bytes that were placed before."""
        return os.pread(self._file, size, start)

    def finish(self, archive_bytes: int) -> None:
        """Let `data` be the archive; its memory is given back with the last view of it."""
        os.ftruncate(self._file, archive_bytes)
        self.data = memoryview(mmap.mmap(self._file, archive_bytes, flags=mmap.MAP_PRIVATE))
        self.close()

    def close(self) -> None:
        """Give back what is not in `data`; idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _to_disk(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = _nameless_file(folder)
            size, copied = os.fstat(self._file).st_size, 0
            while copied < size:
                copied += os.sendfile(file, self._file, copied, size - copied)
        except OSError as error:
            raise StoreFullError(f"The result cannot be kept in {folder}: {error.strerror}.") from error
        os.close(self._file)
        self._file, self.in_memory = file, False


def _anonymous_file() -> int:
    """Return a file that lives in memory where the system has such, else in the folder for temporary files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("edif-result", os.MFD_CLOEXEC)
    return _nameless_file(None)


def _nameless_file(folder: Path | None) -> int:
    """Return a new file that is gone when it closes; None is the folder for temporary files."""
    file, name = tempfile.mkstemp(dir=folder, prefix="edif-result-")
    os.unlink(name)
    return file


class FileSink:
    """A file that appears under its name only when complete; until then `NAME.part`, and `NAME.part.have` beside it.

    The second holds a line for each chunk that is there: number, offset, index entry, SHA-256 of the bytes in the file. It is
    only believed after the bytes were hashed again. One sink at a time holds a file. With `or_nameless` another takes a file
    without a name in the same folder, which is gone when it closes.
    """

    in_memory = False

    def __init__(self, path: Path, *, or_nameless: bool = False) -> None:
        self.path, self._or_nameless = path, or_nameless
        self._part = path.with_name(path.name + ".part")
        self._have = path.with_name(path.name + ".part.have")
        self._file = -1
        self._list: IO[str] | None = None

    def begin(self, job: JobId, attempt: AttemptNumber) -> dict[int, Entry]:
        """Open the partial file and return what of it is of this attempt; raises StoreFullError, ResultError when it is in use."""
        self.close()
        head = {"job": job, "attempt": attempt}
        try:
            # Never truncated: another process may have it mapped.
            self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._take_nameless()
                return {}
            there = self._look(head)
            self._list = self._have.open("w", buffering=1)  # a line is there when its chunk is, also if we are killed
            self._list.write(json.dumps(head) + "\n")
            self._list.writelines(line + "\n" for _, line in there.values())
        except OSError as error:
            raise StoreFullError(f"{self._part} cannot be written: {error.strerror}.") from error
        return {number: entry for number, (entry, _) in there.items()}

    def _take_nameless(self) -> None:
        os.close(self._file)
        self._file = -1
        if not self._or_nameless:
            raise ResultError(f"{self._part} is being written by another process; wait for it, or name another file.")
        self._file = _nameless_file(self.path.parent)
        self._list = open(os.devnull, "w")  # noqa: SIM115

    def place(self, number: int, start: int, entry: Entry, data: memoryview) -> None:
        """Write one chunk and then note that it is there; raises StoreFullError when the disk is full."""
        assert self._list is not None
        try:
            _write(self._file, start, data)
            there = hashlib.sha256(data).digest() if entry.form else entry.digest
            self._list.write(f"{number} {start} {entry.pack().hex()} {there.hex()}\n")
        except OSError as error:
            raise StoreFullError(f"{self._part} cannot be written: {error.strerror}.") from error

    def read(self, start: int, size: int) -> bytes:
        """Return bytes that were placed before."""
        return os.pread(self._file, size, start)

    def map(self, archive_bytes: int) -> memoryview:
        """Return all of it, also what is not there yet, as it lies in the file; zeros where nothing is.

        Not to be written to. Raises StoreFullError.
        """
        try:
            os.ftruncate(self._file, archive_bytes)
        except OSError as error:
            raise StoreFullError(f"{self._part} cannot be written: {error.strerror}.") from error
        return memoryview(mmap.mmap(self._file, archive_bytes))

    def finish(self, archive_bytes: int) -> None:
        """Make it durable and give it its name; raises StoreFullError."""
        try:
            os.ftruncate(self._file, archive_bytes)
            os.fsync(self._file)
            self.close()
            self._part.replace(self.path)
        except OSError as error:
            raise StoreFullError(f"{self.path} cannot be written: {error.strerror}.") from error
        self._have.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop, keeping what is there; idempotent."""
        if self._list is not None:
            with suppress(OSError):
                self._list.close()
            self._list = None
        if self._file >= 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # a map of the file holds the descriptor
            os.close(self._file)
            self._file = -1

    def _look(self, head: dict[str, object]) -> dict[int, tuple[Entry, str]]:
        there: dict[int, tuple[Entry, str]] = {}
        try:
            first, *lines = self._have.read_text().splitlines()
            if json.loads(first) != head:
                return {}
            file = self._part.open("rb")
        except (OSError, ValueError):
            return {}
        with file:
            for line in lines:
                try:
                    number, start, entry_hex, digest = line.split()
                    (entry,) = unpack_entries(bytes.fromhex(entry_hex))
                    file.seek(int(start))
                    data = file.read(min(entry.plain_bytes, CHUNK_BYTES))
                    if hashlib.sha256(data).hexdigest() == digest:
                        there[int(number)] = (entry, line)
                except (ValueError, OverflowError, ManifestError):  # the line that a crash has torn
                    continue
        return there


def make_room(folder: Path, size: int, most_bytes: int = 32 << 30) -> None:
    """Delete what was used longest ago in a cache folder until `size` more bytes fit below `most_bytes`."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    there = []
    for path in folder.glob("*.part"):
        with suppress(OSError):
            info = path.stat()
            there.append((info.st_mtime, info.st_blocks * 512, path))
    kept = sum(used for _, used, _ in there) + size
    for _, used, path in sorted(there):
        if kept <= most_bytes:
            return
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".have").unlink(missing_ok=True)
        kept -= used


def forget(folder: Path, job: JobId) -> None:
    """Delete what a cache folder holds of a job."""
    for path in folder.glob(f"{job}.*"):
        path.unlink(missing_ok=True)


def _write(file: int, start: int, data: memoryview) -> None:
    while len(data):
        written = os.pwrite(file, data, start)
        start, data = start + written, data[written:]
