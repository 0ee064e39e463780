"""What an archive may hold: the allow-lists that encoder and decoder share, and the stand-in for unknown classes."""

from __future__ import annotations

import re
from typing import Any

import torch

DTYPE_NAMES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu "
    "complex128 complex64 complex32 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
).split()
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES if hasattr(torch, name)}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

NUMPY_KINDS = "biufcUS"
"""numpy dtype kinds whose bytes are plain data."""

NUMPY_DTYPE = re.compile(r"[<>|][biufcUS][0-9]{1,9}")
"""The only spellings of a numpy dtype that an archive may hold."""

MODEL_OUTPUTS = ("transformers.modeling_outputs", "transformers.generation.utils")
"""The modules whose `ModelOutput` classes are rebuilt by name."""

KV_LAYERS: dict[str, tuple[str, ...]] = {
    "DynamicLayer": (),
    "DynamicSlidingWindowLayer": ("sliding_window", "cumulative_length"),
}
"""The cache layers that are rebuilt, and which plain settings they have besides keys and values."""

DEFAULT_FACTORIES: dict[str, type] = {t.__name__: t for t in (list, dict, set, tuple, int, float, str, bool)}

MAX_DEPTH = 96
MAX_DIMENSIONS = 64
MAX_NODES = 4_000_000
MAX_EXPANDED = 1 << 24
"""Nodes a walk over the values may meet when shared ones count each time: no tree of references explodes later."""
MAX_KEY_NODES = 10_000
MAX_REPEAT = 1024
"""How many times larger than its storage a tensor with repeating strides may be; below `SMALL_BYTES` it does not matter."""
SMALL_BYTES = 16 << 20


class Extent:
    """Depth and size of a tree with shared parts, counted as a walk that knows nothing of the sharing would meet them.

    Encoder and decoder number finished compounds alike: in the order in which they are left.
    """

    def __init__(self) -> None:
        self.finished = 0
        self._deepest = 0
        self._weight = 0

    def add(self, depth: int, height: int, weight: int) -> bool:
        """Count a part at `depth` that reaches `height` below itself; False when a limit is passed."""
        self._deepest = max(self._deepest, depth + height)
        self._weight += weight
        return depth + height <= MAX_DEPTH and self._weight <= MAX_EXPANDED

    def enter(self, depth: int) -> tuple[int, int]:
        """Begin a compound; give the returned value to `leave`."""
        outer = self._deepest, self._weight
        self._deepest = depth
        return outer

    def leave(self, depth: int, outer: tuple[int, int]) -> tuple[int, int, int]:
        """End the compound: its number, its height, its weight."""
        mine = self.finished, self._deepest - depth, self._weight - outer[1]
        self.finished += 1
        self._deepest = max(self._deepest, outer[0])
        return mine


class Record:
    """A value whose class the reader does not have or did not name: its class's name and its attributes.

    Pass `classes={"module.Name": TheClass}` to `read` to get the real thing.
    """

    type_name: str

    def __init__(self, type_name: str, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self.__dict__["type_name"] = type_name

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items() if name != "type_name")
        return f"Record<{self.type_name}>({inner})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        plain = [(k, v) for k, v in sorted(self.__dict__.items()) if isinstance(v, str | int | float | bytes)]
        return hash(tuple(plain))


class EnumRecord(Record):
    """A member of an enum that the reader did not name: `.name` and `.value`."""
