"""The weights check: a keyed checksum over the shared segments, computed where they lie, a few kernels a piece.

Each piece of a segment is the sum, modulo 2^64, of its 32-bit words times secret odd 64-bit numbers, one for each place. A
single changed word always shows, wherever it is; words that change places, or any other change that is not made with the
secret in hand, are missed with a probability below 2^-31 a piece. The secret is drawn by the weights owner, which no job ever
shares a process with. Nothing is hashed together, so that a difference says where it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

PIECE_WORDS = 1 << 20
"""4 MiB of weights a piece; the workspace is 16 MiB a device whatever the model's size."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first piece of a segment that is not what it was, in bytes."""

    segment: int
    start: int
    end: int


class WeightsChecksum:
    """One secret, for as long as its owner lives."""

    def __init__(self, piece_words: int = PIECE_WORDS) -> None:
        self._words = piece_words
        self._secret = bytearray(os.urandom(8 * piece_words))
        self._places: dict[str, Any] = {}

    def of(self, words: Any) -> list[int]:
        """Return the sums over a flat int32 tensor, one a piece; reads every byte of it on its own device."""
        import torch

        places = self._on(words.device)
        sums = [
            torch.mul(piece, places[: piece.numel()]).sum()  # int32 by int64: computed and summed modulo 2^64
            for piece in words.split(self._words)
        ]
        return [int(value) for value in torch.stack(sums).cpu().tolist()]

    def first_difference(self, before: list[list[int]], after: list[list[int]]) -> Difference | None:
        """Return where two readings of the same segments differ first; None when they are equal."""
        for segment, (old, new) in enumerate(zip(before, after, strict=True)):
            for number, (one, other) in enumerate(zip(old, new, strict=True)):
                if one != other:
                    size = 4 * self._words
                    return Difference(segment, number * size, (number + 1) * size)
        return None

    def _on(self, device: Any) -> Any:
        import torch

        if str(device) not in self._places:
            odd = torch.frombuffer(self._secret, dtype=torch.int64) | 1
            self._places[str(device)] = odd.to(device)
        return self._places[str(device)]
