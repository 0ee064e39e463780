"""What an archive may hold: the allow-lists that encoder and decoder share, and the stand-in for unknown classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

import torch

from edif_mesh.errors import ArchiveError

Node = Any

DTYPE_NAMES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu "
    "complex128 complex64 complex32 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool float4_e2m1fn_x2 "
    "uint1 uint2 uint3 uint4 uint5 uint6 uint7 int1 int2 int3 int4 int5 int6 int7 bits1x8 bits2x4 bits4x2 bits8 bits16"
).split()
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES if hasattr(torch, name)}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

BARE: dict[torch.dtype, torch.dtype] = {
    dtype: torch.int16 if name == "bits16" else torch.uint8
    for name, dtype in DTYPES.items()
    if name.startswith("bits") or re.fullmatch(r"u?int[1-7]", name)
}
"""The dtypes that torch names but cannot copy or save, and those as which their bytes are handled."""

QUANTIZED: dict[str, torch.dtype] = {"qint8": torch.int8, "quint8": torch.uint8, "qint32": torch.int32}
"""The quantized dtypes that are shipped, and the integers that hold their numbers."""

NUMPY_KINDS = "biufcUSmM"
"""numpy dtype kinds whose bytes are plain data."""

NUMPY_DTYPE = re.compile(
    r"[<>|][biufcUS][0-9]{1,9}|[<>][mM]8(\[([1-9][0-9]{0,8})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?"
)
"""The only spellings of a numpy dtype that an archive may hold."""

MODEL_OUTPUTS = ("transformers.modeling_outputs", "transformers.generation.utils")
"""The modules whose `ModelOutput` classes are rebuilt by name."""

MODEL_MODULE = re.compile(r"transformers\.models\.[a-z0-9_]{1,60}\.modeling_[a-z0-9_]{1,60}")
"""The modules whose `ModelOutput` classes are rebuilt where they are loaded already."""

KV_LAYERS: dict[str, tuple[str, ...]] = {
    "DynamicLayer": (),
    "DynamicSlidingWindowLayer": ("sliding_window", "cumulative_length"),
}
"""The layers of a `kv_cache`, and which plain settings they have besides keys and values."""

CACHES = ("DynamicCache", "StaticCache")
"""The caches that are rebuilt from their layers."""

CACHE_LAYERS = (
    *KV_LAYERS,
    *("DynamicIndexedLayer", "StaticLayer", "StaticSlidingWindowLayer", "StaticIndexedLayer", "LinearAttentionLayer"),
    *("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
    *("LinearAttentionAndStaticFullAttentionLayer", "LinearAttentionAndStaticSlidingWindowAttentionLayer"),
)
"""The layers of a `cache`, rebuilt from their attributes."""

LAYER_ATTRIBUTES = frozenset(
    "keys values is_initialized dtype device sliding_window cumulative_length cumulative_length_int _sliding_window_tensor "
    "record_past max_cache_len batch_size num_heads v_head_dim k_head_dim indexer_keys indexer_position_ids indexer_dtype "
    "indexer_device indexer_cumulative_length is_indexer_initialized number_of_states conv_states recurrent_states "
    "is_conv_states_initialized is_recurrent_states_initialized has_previous_state conv_kernel_size max_batch_size".split()
)
"""What a layer of a `cache` may have: tensors, numbers, truths, dtypes, devices, and dictionaries from numbers to these."""

DEFAULT_FACTORIES: dict[str, type] = {t.__name__: t for t in (list, dict, set, tuple, int, float, str, bool)}

MAX_DEPTH = 96
MAX_DIMENSIONS = 64
MAX_NODES = 4_000_000
MAX_EXPANDED = 1 << 24
"""Nodes a walk over the values may meet when shared ones count each time: no tree of references explodes later."""
MAX_KEY_NODES = 10_000
MAX_ENCODING_BYTES = 64 << 20
"""Bytes of JSON of all tokenizer encodings in one archive; a reader takes many times as much memory to check them."""
MAX_REPEAT = 1024
"""How many times larger than its storage a tensor with repeating strides may be; below `SMALL_BYTES` it does not matter."""
SMALL_BYTES = 16 << 20


class Walk(Protocol):
    """What the rules of single kinds need of the encoder."""

    def node(self, value: Any, path: str, depth: int) -> Node:
        """Encode a part of the value."""
        ...

    def add(self, data: Callable[[], memoryview], element: int = 0) -> int:
        """Add a storage, whose bytes are asked for only when they are shipped; return its number."""
        ...

    def add_encoding(self, data: bytes, path: str) -> int:
        """Add the JSON of a tokenizer's encoding as a storage; raises UnsupportedValueError for too much of it."""
        ...

    def integers(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the integers of a quantized tensor, or any of their shape and dtype where nothing is shipped."""
        ...

    def place(self, tensor: torch.Tensor, node: dict[str, Any]) -> Node:
        """Add a strided tensor, whose node is completed once all tensors are known."""
        ...


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


def as_list(value: Any) -> list[Any]:
    """Return `value`, a list of the archive's tree; raises ArchiveError."""
    if not isinstance(value, list):
        raise ArchiveError("The archive's tree has no list where one must be.")
    return value


def as_int(value: Any, low: int, high: int) -> int:
    """Return `value`, a number from `low` to `high` of the archive's tree; raises ArchiveError."""
    if type(value) is not int or not low <= value <= high:
        raise ArchiveError(f"The archive's tree has {str(value)[:30]!r} where a number from {low} to {high} must be.")
    return value


def is_small_key(key: Any) -> bool:
    """Whether hashing `key` walks at most `MAX_KEY_NODES` parts, counting shared ones each time."""
    stack, count = [key], 0
    while stack:
        part = stack.pop()
        count += 1
        if count > MAX_KEY_NODES:
            return False
        if isinstance(part, tuple | frozenset):
            stack.extend(part)
    return True


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
