"""What an archive may hold: the allow-lists that encoder and decoder share, and the stand-in for unknown classes."""

from __future__ import annotations

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

MODEL_OUTPUTS = "transformers.modeling_outputs"
"""The one module whose `ModelOutput` classes are rebuilt by name."""

MAX_DEPTH = 64
MAX_DIMENSIONS = 64
MAX_NODES = 4_000_000


class Record:
    """A value whose class the reader does not have or did not name: its class's name and its attributes.

    Pass `classes={"module.Name": TheClass}` to `read` to get the real thing.
    """

    def __init__(self, type_name: str, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self.__dict__["type_name"] = type_name

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items() if name != "type_name")
        return f"Record<{self.type_name}>({inner})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]
