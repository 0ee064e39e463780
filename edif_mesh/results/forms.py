"""The forms of one result's chunks: used again, compressed, sealed (the site's side), and opened (the researcher's)."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from edif_mesh.domain.ids import AttemptNumber, JobId, KeyId
from edif_mesh.errors import ChunkError
from edif_mesh.results.choice import Choice
from edif_mesh.results.chunks import AS_IS
from edif_mesh.results.codec import decode, encode
from edif_mesh.results.index import OWN, Entry
from edif_mesh.results.sealing import SEALED, Sealer, Unsealer
from edif_mesh.results.transfer import Made, sha256
from edif_mesh.wire.messages import Lender, Manifest, ResultPart

LEAST_SHARED_BYTES = 64 << 10
_MAX_LENDERS = 1000


@dataclass(frozen=True, slots=True)
class _Kept:
    lender: Lender
    entry: Entry
    until_ms: int


class SharedChunks:
    """Which chunks of which committed results lie at the broker, by who may use them again and by SHA-256 of their plain bytes.

    Bounded in number and in time: what is forgotten is stored once more, nothing else.
    """

    def __init__(self, keep_ms: int = 6 * 3_600_000, most: int = 200_000) -> None:
        self._keep_ms, self._most = keep_ms, most
        self._kept: OrderedDict[tuple[KeyId, str, bytes], _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, owner: KeyId, session: str, digest: bytes, now_ms: int) -> _Kept | None:
        """Return where such a chunk lies, or None."""
        with self._lock:
            found = self._kept.get((owner, session, digest))
            return found if found is not None and now_ms < found.until_ms else None

    def add(self, owner: KeyId, session: str, lender: Lender, chunks: dict[bytes, Entry], now_ms: int) -> None:
        """Note the chunks of a result that was committed, by digest of their plain bytes."""
        with self._lock:
            for digest, entry in chunks.items():
                self._kept.setdefault((owner, session, digest), _Kept(lender, entry, now_ms + self._keep_ms))
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)

    def drop(self, job: JobId) -> None:
        """Forget the chunks of a job: they are about to be deleted."""
        with self._lock:
            for key in [key for key, kept in self._kept.items() if kept.lender.job == job]:
                del self._kept[key]


@dataclass(frozen=True, slots=True)
class Sharing:
    """With whom one result may share chunks."""

    chunks: SharedChunks
    owner: KeyId
    session: str
    now_ms: Callable[[], int]


class ChunkForms:
    """`transfer.Form` of one attempt."""

    def __init__(self, choice: Choice, *, sealer: Sealer | None = None, sharing: Sharing | None = None) -> None:
        """A sealed result shares nothing: its chunks open under its own key only."""
        self._choice, self._sealer = choice, sealer
        self._sharing = sharing if sealer is None else None
        self._lenders: list[Lender] = []
        self._own: dict[int, bytes] = {}
        self._shared: dict[bytes, Entry] = {}
        self._lock = threading.Lock()

    @property
    def lenders(self) -> tuple[Lender, ...]:
        """As in the manifest."""
        return tuple(self._lenders)

    @property
    def sealed_key(self) -> str:
        """As in the manifest."""
        return self._sealer.sealed_key if self._sealer is not None else ""

    def make(self, number: int, plain: Sequence[memoryview], element: int) -> Made:
        """Return the chunk in the form that suits it. Called in threads."""
        size = sum(len(piece) for piece in plain)
        digest = b""
        if self._sharing is not None and size >= LEAST_SHARED_BYTES:
            digest = sha256(plain)
            if (lent := self._lent(digest, size)) is not None:
                return lent
            self._own[number] = digest
        level = self._choice.level(element)
        form, pieces = AS_IS, tuple[bytes | memoryview, ...](plain)
        if level:
            began = time.perf_counter()
            form, packed = encode(plain[0] if len(plain) == 1 else b"".join(plain), element, level)
            self._choice.learn(element, size, len(packed), time.perf_counter() - began)
            pieces = (packed,)
        if self._sealer is not None:
            form |= SEALED
            pieces = (self._sealer.seal(number, form, pieces[0] if len(pieces) == 1 else b"".join(pieces)),)
        if form or not digest:
            digest = sha256(pieces)
        stored = sum(len(piece) for piece in pieces)
        return Made(Entry(size, stored, form, element if form else 0, OWN, number, digest), pieces)

    def _lent(self, digest: bytes, size: int) -> Made | None:
        assert self._sharing is not None
        sharing = self._sharing
        found = sharing.chunks.find(sharing.owner, sharing.session, digest, sharing.now_ms())
        if found is None or found.entry.plain_bytes != size:
            return None
        with self._lock:
            if found.lender not in self._lenders:
                if len(self._lenders) >= _MAX_LENDERS:
                    return None
                self._lenders.append(found.lender)
            place = self._lenders.index(found.lender) + 1
        entry = found.entry
        return Made(Entry(size, entry.stored_bytes, entry.form, entry.element, place, entry.number, entry.digest), ())

    def stored(self, made: Made, now_s: float, in_flight: int) -> None:
        """The broker has a chunk."""
        entry = made.entry
        self._choice.link.acknowledged(entry.stored_bytes, now_s, in_flight)
        if (digest := self._own.pop(entry.number, None)) is not None:
            self._shared[digest] = entry

    def committed(self, job: JobId, attempt: AttemptNumber) -> None:
        """The attempt has succeeded: its chunks stay, so later results may use them again."""
        if (sharing := self._sharing) is not None:
            sharing.chunks.add(sharing.owner, sharing.session, Lender(job, attempt), self._shared, sharing.now_ms())


class FormOpener:
    """`chunks.Opener` of the researcher."""

    def __init__(self, private: X25519PrivateKey | None = None, *, demanded: bool = True) -> None:
        """`private` opens what is sealed, None refuses it; with a key that is `demanded` nothing else is taken."""
        self._private, self._demanded = private, demanded and private is not None
        self._unsealers: dict[str, Unsealer] = {}

    def open(self, of: Manifest | ResultPart, number: int, entry: Entry, stored: memoryview) -> memoryview:
        """Return the chunk's piece of the archive; raises ChunkError, ManifestError."""
        form, data = entry.form, stored
        if form & SEALED:
            data = memoryview(self._unsealer(of).open(entry.number, form, stored))
        elif self._demanded:
            raise ChunkError(f"Chunk {number} is not sealed, although the order demands it; it was not accepted.")
        return decode(number, entry, form & ~SEALED, data)

    def _unsealer(self, of: Manifest | ResultPart) -> Unsealer:
        if self._private is None:
            raise ChunkError("The result is sealed, although its order did not ask for that; it was not accepted.")
        if of.sealed_key not in self._unsealers:
            self._unsealers[of.sealed_key] = Unsealer(self._private, of.sealed_key, of.order_digest, of.attempt)
        return self._unsealers[of.sealed_key]
