"""Which compression the next chunk gets: from measured speeds, without I/O or clock."""

from __future__ import annotations

from dataclasses import dataclass, field

OFF, FAST, BEST = 0, 1, 9
LEVELS = {"off": OFF, "fast": FAST, "best": BEST}
_SEEN_PART = 0.9
"""Compressing and opening cost time beside the link; this part of it is seen, for the cores carry the bytes as well."""
_LOOK_AGAIN_CHUNKS = 64
_FAST_LINK_BYTES_PER_S = 60e6
_LEAST_S, _LEAST_BYTES = 0.1, 1 << 20
"""What an estimate of a link is made of: less would measure the buffers before it."""
_MEMORY = 0.7


@dataclass(slots=True)
class LinkEstimate:
    """Bytes a second that a link carries when it is busy; 0 while unknown. Kept across results."""

    bytes_per_s: float = 0.0
    _bytes: int = 0
    _since_s: float | None = None

    def acknowledged(self, size: int, now_s: float, in_flight: int) -> None:
        """Count `size` bytes that have arrived; only time in which more were on their way (`in_flight` chunks) says something."""
        if self._since_s is not None:
            self._bytes += size
            took_s = now_s - self._since_s
            if took_s >= _LEAST_S and self._bytes >= _LEAST_BYTES:
                rate = self._bytes / took_s
                # What a link has carried it can carry; that it carried less may be the sender's doing.
                old_part = _MEMORY if rate < self.bytes_per_s else 1 - _MEMORY
                self.bytes_per_s = rate if not self.bytes_per_s else old_part * self.bytes_per_s + (1 - old_part) * rate
                self._since_s, self._bytes = now_s, 0
        if in_flight == 0:
            self._since_s, self._bytes = None, 0
        elif self._since_s is None:
            self._since_s = now_s


@dataclass(slots=True)
class _Measured:
    ratio: float
    seconds_per_byte: float
    at: int


@dataclass(slots=True)
class Choice:
    """The level for each chunk of one result. `setting` as in `ResultOptions.compression`."""

    setting: str
    link: LinkEstimate
    """Of the site's way to the broker."""
    client_bytes_per_s: int = 0
    """Of the researcher's way from there; 0: unknown."""
    _measured: dict[int, _Measured] = field(default_factory=dict)
    _tried: set[int] = field(default_factory=set)
    _chunks: int = 0

    def level(self, element: int) -> int:
        """Return the zstd level for the next chunk of numbers of `element` bytes; 0: it travels as it is."""
        self._chunks += 1
        if self.setting != "auto":
            return LEVELS[self.setting]
        link = min((rate for rate in (self.link.bytes_per_s, self.client_bytes_per_s) if rate), default=0.0)
        seen = self._measured.get(element)
        if seen is None:
            # Nothing is known of these bytes. A first chunk costs 2 ms; a slow link that gets them as they are costs seconds.
            first = element not in self._tried
            self._tried.add(element)
            return FAST if first or link < _FAST_LINK_BYTES_PER_S else OFF
        if self._chunks - seen.at > _LOOK_AGAIN_CHUNKS and seen.ratio > 0.97:
            seen.at = self._chunks
            return FAST
        if not link:
            return FAST
        return FAST if seen.ratio / link + _SEEN_PART * seen.seconds_per_byte < 1 / link else OFF

    def learn(self, element: int, plain_bytes: int, stored_bytes: int, seconds: float) -> None:
        """A chunk was compressed: to so many bytes, in so much time."""
        if plain_bytes < 1 << 14:
            self._tried.discard(element)  # it says nothing: another one is tried
            return
        now = _Measured(stored_bytes / plain_bytes, seconds / plain_bytes, self._chunks)
        before = self._measured.get(element)
        if before is not None:
            now.ratio = _MEMORY * before.ratio + (1 - _MEMORY) * now.ratio
            now.seconds_per_byte = min(before.seconds_per_byte, now.seconds_per_byte)
        self._measured[element] = now
