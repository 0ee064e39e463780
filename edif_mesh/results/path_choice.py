"""Which way the next bytes of a result come: a plain function of what was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

WORTH_BYTES = 8 << 20
"""A smaller result comes by the broker: it is here before a connection is made."""
PROBE_BYTES = 16 << 20
"""So much is fetched to measure a way; nothing of it is wasted."""
WINDOW_BYTES = 32 << 20
"""A running way is measured again over each such span."""
_SLOWER = 0.6
"""A way that falls below this part of the other's speed is left."""
_FORGET_MS = 600_000
"""The slower way is tried again when it was last measured so long ago."""
UNREACHABLE_MS, BROKEN_MS, LYING_MS = 300_000, 30_000, 24 * 3_600_000
"""How long the direct way is not tried after nobody answered, after it broke off or refused, after it gave wrong bytes."""


class Path(StrEnum):
    """The ways."""

    DIRECT = "direct"
    BROKER = "broker"


@dataclass(frozen=True, slots=True)
class Measured:
    """One way's speed to verified bytes, and when it was last seen."""

    bytes_s: float
    at_ms: int


@dataclass(frozen=True, slots=True)
class Known:
    """What was learnt of the ways to one site. Instants are monotonic."""

    direct: Measured | None = None
    broker: Measured | None = None
    barred_until_ms: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """Fetch so many bytes this way, then ask again."""

    path: Path
    at_most_bytes: int


def next_step(known: Known, left_bytes: int, now_ms: int) -> Step:
    """Return how to go on with `left_bytes`: measure what is not known, then the faster way for the rest."""
    if now_ms < known.barred_until_ms or left_bytes < WORTH_BYTES:
        return Step(Path.BROKER, left_bytes)
    if _old(known.direct, now_ms):
        return Step(Path.DIRECT, _probe(left_bytes))
    if _old(known.broker, now_ms) and left_bytes > PROBE_BYTES:
        return Step(Path.BROKER, PROBE_BYTES // 2)
    return Step(_faster(known), left_bytes)


def should_leave(known: Known, path: Path) -> bool:
    """Return whether the way that is used has become so slow that the other is better."""
    used, other = (known.direct, known.broker) if path is Path.DIRECT else (known.broker, known.direct)
    return used is not None and other is not None and used.bytes_s < _SLOWER * other.bytes_s


def learnt(known: Known, path: Path, bytes_s: float, now_ms: int) -> Known:
    """Return what is known after a span was measured."""
    new = Measured(bytes_s, now_ms)
    return replace(known, direct=new) if path is Path.DIRECT else replace(known, broker=new)


def barred(known: Known, for_ms: int, now_ms: int) -> Known:
    """Return what is known once the direct way has failed; it is measured anew afterwards."""
    return replace(known, direct=None, barred_until_ms=max(known.barred_until_ms, now_ms + for_ms))


def _probe(left_bytes: int) -> int:
    return left_bytes if left_bytes <= 2 * PROBE_BYTES else PROBE_BYTES


def _old(measured: Measured | None, now_ms: int) -> bool:
    return measured is None or now_ms - measured.at_ms > _FORGET_MS


def _faster(known: Known) -> Path:
    direct = known.direct.bytes_s if known.direct is not None else 0.0
    broker = known.broker.bytes_s if known.broker is not None else 0.0
    return Path.DIRECT if direct > broker else Path.BROKER
