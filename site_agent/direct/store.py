"""What a site keeps of its results on its own disk, so that it can serve them itself: bounded, the oldest first to go.

It is a second copy: the broker has all of it. So nothing waits for this disk: what a power cut damages is found by its
SHA-256 at the reader, who then takes the broker's. A result that cannot be kept is only not served from here.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from edif_mesh.domain.ids import AttemptNumber, JobId, KeyId
from edif_mesh.results.index import Index
from edif_mesh.results.transfer import Form, Made, Pieces
from edif_mesh.wire.messages import Lender
from site_agent.direct.kept import NOWHERE, data_file, index_file, packed_index

log = logging.getLogger(__name__)

WORTH_BYTES = 4 << 20
"""A smaller result has arrived by the broker before a connection is made; it is not kept."""

Key = tuple[JobId, AttemptNumber]


class ResultStore:
    """The kept results of one site. Threads may call it; only one process may."""

    def __init__(self, folder: Path, keep_bytes: int, keep_ms: int) -> None:
        """Empty `folder` of what an earlier run did not finish. Raises OSError when it cannot be used."""
        self.folder, self._keep_bytes, self._keep_ms = folder, keep_bytes, keep_ms
        self._lock = threading.Lock()
        self._sizes: dict[Key, int] = {}
        """What is kept or being made, the oldest first."""
        self._finished: dict[Key, int] = {}
        """Since when, Unix ms."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._look()

    def open(self, job: JobId, attempt: AttemptNumber, owner: KeyId) -> Keeping:
        """Begin to keep an attempt's chunks."""
        with self._lock:
            self._delete((job, attempt))
            self._sizes[job, attempt] = 0
        return Keeping(self, (job, attempt), owner)

    def drop(self, job: JobId) -> None:
        """Delete everything of a job; idempotent."""
        with self._lock:
            for key in [key for key in self._sizes if key[0] == job]:
                self._delete(key)

    def sweep(self) -> None:
        """Delete what was kept for long enough."""
        until = _now_ms() - self._keep_ms
        with self._lock:
            for key in [key for key, since in self._finished.items() if since < until]:
                self._delete(key)

    def reserve(self, key: Key, more: int) -> bool:
        """Make room for `more` bytes of an attempt; returns whether there is, and it was not dropped."""
        with self._lock:
            if key not in self._sizes:
                return False
            others = iter([other for other in self._finished if other != key])
            while sum(self._sizes.values()) + more > self._keep_bytes:
                oldest = next(others, None)
                if oldest is None:
                    return False
                self._delete(oldest)
            self._sizes[key] += more
            return True

    def finished(self, key: Key, content: bytes) -> bool:
        """Let a result be served; returns whether it can be."""
        name = index_file(self.folder, *key)
        with self._lock:
            if key not in self._sizes:
                return False
            temporary = name.with_suffix(".new")
            temporary.write_bytes(content)
            temporary.replace(name)
            self._finished[key] = _now_ms()
            return True

    def forget(self, key: Key) -> None:
        """Delete an attempt; idempotent."""
        with self._lock:
            self._delete(key)

    def _delete(self, key: Key) -> None:
        self._sizes.pop(key, None)
        self._finished.pop(key, None)
        for name in (index_file(self.folder, *key), data_file(self.folder, *key)):
            name.unlink(missing_ok=True)

    def _look(self) -> None:
        """Know again what an earlier run has finished; remove the rest."""
        found: list[tuple[int, Key, int]] = []
        for name in self.folder.iterdir():
            job, attempt, *_ = (*name.name.split("."), "")
            data = data_file(self.folder, JobId(job), AttemptNumber(int(attempt))) if attempt.isdigit() else None
            if name.suffix == ".index" and data is not None and data.exists():
                since = int(name.stat().st_mtime * 1000)
                found.append((since, (JobId(job), AttemptNumber(int(attempt))), data.stat().st_size))
            elif name.suffix != ".data" or not name.with_suffix(".index").exists():
                name.unlink(missing_ok=True)
        for since, key, size in sorted(found):
            self._sizes[key], self._finished[key] = size, since
        self.sweep()


class Keeping:
    """One attempt's chunks on their way to the disk. It never fails its attempt: what goes wrong ends the keeping only."""

    def __init__(self, store: ResultStore, key: Key, owner: KeyId) -> None:
        self._store, self._key, self._owner = store, key, owner
        self._lock = threading.Lock()
        self._places: dict[int, int] = {}
        self._early: list[tuple[int, Pieces]] | None = []
        self._early_bytes = self._end = 0
        self._file = -1
        self._ended = False

    def add(self, number: int, pieces: Pieces) -> None:
        """Keep a chunk as it travels; called in threads, in any order."""
        size = sum(len(piece) for piece in pieces)
        try:
            with self._lock:
                if self._ended or not size:
                    return
                if self._early is not None:
                    self._early.append((number, pieces))
                    self._early_bytes += size
                    if self._early_bytes < WORTH_BYTES:
                        return
                waiting, self._early = self._early or [(number, pieces)], None
                places = [(self._place(n, sum(len(piece) for piece in p)), p) for n, p in waiting]
            for place, chunk in places:
                self._write(place, chunk)
        except OSError as error:
            self._give_up(f"{self._store.folder} cannot be written: {error.strerror}")

    def finish(self, index: Index) -> bool:
        """Let the result be served; returns whether it can be. All chunks were added before."""
        with self._lock:
            whole = not self._ended and self._early is None
            self._close()
        if not whole:
            self._store.forget(self._key)
            return False
        places = [self._places.get(number, NOWHERE) for number in range(len(index))]
        try:
            return self._store.finished(self._key, packed_index(self._owner, index, places))
        except OSError as error:
            self._give_up(f"{self._store.folder} cannot be written: {error.strerror}")
            return False

    def abandon(self) -> None:
        """Delete what is there unless it was finished; idempotent."""
        with self._lock:
            if not self._ended:
                self._close()
                self._store.forget(self._key)

    def _place(self, number: int, size: int) -> int:
        """Return where a chunk is to lie, -1 when there is no room."""
        if self._ended or not self._store.reserve(self._key, size):
            if not self._ended:
                self._close()
                self._store.forget(self._key)
                log.warning("a result is not kept: keep_bytes is used up", extra={"job": self._key[0]})
            return -1
        if self._file < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._file = os.open(data_file(self._store.folder, *self._key), flags, 0o600)
        place, self._end = self._end, self._end + size
        self._places[number] = place
        return place

    def _write(self, place: int, pieces: Pieces) -> None:
        with self._lock:  # one writer at a time; the disk's cache takes it at the speed of memory
            if self._ended or place < 0:
                return
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while len(view):
                    written = os.pwrite(self._file, view, place)
                    place, view = place + written, view[written:]

    def _give_up(self, reason: str) -> None:
        log.warning("a result is not kept", extra={"job": self._key[0], "reason": reason})
        with self._lock:
            self._close()
            self._store.forget(self._key)

    def _close(self) -> None:
        self._ended = True
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class KeepingForm:
    """A form whose chunks are kept as they are made."""

    def __init__(self, form: Form, keeping: Keeping) -> None:
        self._form, self._keeping = form, keeping

    @property
    def lenders(self) -> tuple[Lender, ...]:
        """As of the form."""
        return self._form.lenders

    @property
    def sealed_key(self) -> str:
        """As of the form."""
        return self._form.sealed_key

    def make(self, number: int, plain: Sequence[memoryview], element: int) -> Made:
        """Make the chunk and keep it."""
        made = self._form.make(number, plain, element)
        self._keeping.add(number, made.stored)
        return made

    def stored(self, made: Made, now_s: float, in_flight: int) -> None:
        """As of the form."""
        self._form.stored(made, now_s, in_flight)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
