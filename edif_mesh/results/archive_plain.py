"""Values without parts, both directions side by side: what each is written as, and what a reader checks before it makes one."""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any

import torch

from edif_mesh.errors import ArchiveError, UnsupportedValueError
from edif_mesh.results.archive_types import DTYPES, NUMPY_DTYPE, as_int, as_list

Node = dict[str, Any]

TORCH_NAMES: dict[str, Any] = {
    name: getattr(torch, name)
    for name in (
        "strided sparse_coo sparse_csr sparse_csc sparse_bsr sparse_bsc jagged contiguous_format channels_last "
        "channels_last_3d preserve_format per_tensor_affine per_channel_affine per_channel_affine_float_qparams"
    ).split()
    if hasattr(torch, name)
}
"""torch's layouts, memory formats and quantization schemes."""

MAX_FRACTION_BITS = 1 << 16
"""A reader reduces a fraction, which takes the square of its length."""
MAX_RANGE = 1 << 63
_DECIMAL = re.compile(r"-?(\d{1,100000}(\.\d{0,100000})?(E[+-]?\d{1,18})?|Infinity|s?NaN\d{0,1000})")
_PATHS: dict[str, type[PurePath]] = {c.__name__: c for c in (PosixPath, WindowsPath, PurePosixPath, PureWindowsPath)}


def encode_plain(value: Any, kind: type, path: str) -> Node | None:
    """Return the node of a value without parts, or None when it is of no such kind.

    Raises UnsupportedValueError for one that no reader would take.
    """
    if value is Ellipsis:
        return {"t": "ellipsis"}
    rule = _ENCODE.get(kind)
    if rule is not None:
        return rule(value, path)
    return {"t": "npdtype", "v": _numpy_dtype(value, path)} if kind.__module__ == "numpy.dtypes" else None


def _range(value: range, path: str) -> Node:
    numbers = [value.start, value.stop, value.step]
    if not all(-MAX_RANGE <= number <= MAX_RANGE for number in numbers):
        raise UnsupportedValueError(path, "range beyond 64 bits", "Save its start, stop and step.")
    return {"t": "range", "v": numbers}


def _zone(value: dt.tzinfo | None, path: str) -> list[Any] | None:
    if value is None:
        return None
    if type(value) is not dt.timezone:
        raise UnsupportedValueError(
            path, f"time in a {type(value).__name__}", "Save .astimezone(datetime.timezone.utc) of it."
        )
    offset, name = value.utcoffset(None), value.tzname(None)
    return [offset // _MICROSECOND, None if name == dt.timezone(offset).tzname(None) else name]


def _datetime(value: dt.datetime, path: str) -> Node:
    numbers = [value.year, value.month, value.day, *_clock(value)]
    return {"t": "datetime", "v": numbers, "z": _zone(value.tzinfo, path)}


def _clock(value: dt.datetime | dt.time) -> list[int]:
    return [value.hour, value.minute, value.second, value.microsecond, value.fold]


def _fraction(value: Fraction, path: str) -> Node:
    parts = value.numerator, value.denominator
    if max(part.bit_length() for part in parts) > MAX_FRACTION_BITS:
        raise UnsupportedValueError(path, "Fraction of very large numbers", "Save its numerator and denominator.")
    return {"t": "fraction", "v": [hex(part) for part in parts]}


def _decimal(value: Decimal, path: str) -> Node:
    text = str(value)
    if not _DECIMAL.fullmatch(text):
        raise UnsupportedValueError(path, "Decimal of very many digits", "Save str(...) of it.")
    return {"t": "decimal", "v": text}


def _numpy_dtype(value: Any, path: str) -> str:
    if not NUMPY_DTYPE.fullmatch(value.str):
        raise UnsupportedValueError(path, f"numpy dtype {str(value)[:80]}", "Save str(...) of it.")
    return str(value.str)


_MICROSECOND = dt.timedelta(microseconds=1)
_ENCODE: dict[type, Callable[[Any, str], Node]] = {
    complex: lambda v, p: {"t": "complex", "v": [repr(v.real), repr(v.imag)]},
    torch.Size: lambda v, p: {"t": "size", "v": list(v)},
    torch.dtype: lambda v, p: {"t": "dtype", "v": str(v).removeprefix("torch.")},
    torch.device: lambda v, p: {"t": "device", "v": str(v)},
    range: _range,
    dt.date: lambda v, p: {"t": "date", "v": [v.year, v.month, v.day]},
    dt.datetime: _datetime,
    dt.time: lambda v, p: {"t": "time", "v": _clock(v), "z": _zone(v.tzinfo, p)},
    dt.timedelta: lambda v, p: {"t": "timedelta", "v": [v.days, v.seconds, v.microseconds]},
    dt.timezone: lambda v, p: {"t": "timezone", "z": _zone(v, p)},
    Decimal: _decimal,
    Fraction: _fraction,
    uuid.UUID: lambda v, p: {"t": "uuid", "v": v.hex},
    **dict.fromkeys(_PATHS.values(), lambda v, p: {"t": "path", "c": type(v).__name__, "v": str(v)}),
    **dict.fromkeys(
        {type(value) for value in TORCH_NAMES.values()},
        lambda v, p: {"t": "torch_name", "v": next(name for name, found in TORCH_NAMES.items() if found == v)},
    ),
}


# ------------------------------------------------------------------------------------------------------------ reading


def _numbers(value: Any, count: int) -> list[int]:
    numbers = [as_int(number, -(10**10), 10**10) for number in as_list(value)]
    if len(numbers) != count:
        raise ArchiveError("A date or time has too few or too many numbers.")
    return numbers


def _as_zone(value: Any) -> dt.timezone | None:
    if value is None:
        return None
    offset, name = as_list(value)
    delta = dt.timedelta(microseconds=as_int(offset, -(10**12), 10**12))
    return dt.timezone(delta) if name is None else dt.timezone(delta, as_text(name, 1000))


def _as_datetime(node: Node) -> dt.datetime:
    *numbers, fold = _numbers(node["v"], 8)
    return dt.datetime(*numbers, tzinfo=_as_zone(node["z"]), fold=fold)  # type: ignore[misc, arg-type]


def _as_time(node: Node) -> dt.time:
    *numbers, fold = _numbers(node["v"], 5)
    return dt.time(*numbers, tzinfo=_as_zone(node["z"]), fold=fold)  # type: ignore[misc, arg-type]


def _as_fraction(node: Node) -> Fraction:
    numbers = [int(as_text(text, MAX_FRACTION_BITS // 4 + 8), 16) for text in as_list(node["v"])]
    return Fraction(*numbers)


def _as_decimal(node: Node) -> Decimal:
    text = as_text(node["v"], 300_000)
    if not _DECIMAL.fullmatch(text):
        raise ArchiveError("A decimal number is not written as one.")
    return Decimal(text)


def _as_path(node: Node) -> PurePath:
    kind = _PATHS[str(node["c"])]
    if kind in (PosixPath, WindowsPath) and kind is not type(Path()):
        kind = PurePosixPath if kind is PosixPath else PureWindowsPath
    return kind(as_text(node["v"], 100_000))


def _as_uuid(node: Node) -> uuid.UUID:
    return uuid.UUID(int=int(as_text(node["v"], 32), 16))


def _as_numpy_dtype(node: Node) -> Any:
    import numpy as np

    if not NUMPY_DTYPE.fullmatch(as_text(node["v"], 40)):
        raise ArchiveError("A numpy dtype is none that an archive may hold.")
    return np.dtype(node["v"])


def as_text(value: Any, longest: int) -> str:
    """Return `value`, a text of at most `longest` characters; raises ArchiveError."""
    if not isinstance(value, str) or len(value) > longest:
        raise ArchiveError("The archive's tree has no short text where one must be.")
    return value


DECODE: dict[str, Callable[[Node], Any]] = {
    "int": lambda n: int(n["v"], 16),
    "float": lambda n: {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}[n["v"]],
    "complex": lambda n: complex(float(n["v"][0]), float(n["v"][1])),
    "surrogates": lambda n: "".join(map(chr, as_list(n["v"]))),
    "size": lambda n: torch.Size([as_int(size, 0, 1 << 48) for size in as_list(n["v"])]),
    "dtype": lambda n: DTYPES[str(n["v"])],
    "device": lambda n: torch.device(str(n["v"])[:20]),
    "range": lambda n: range(*(as_int(number, -MAX_RANGE, MAX_RANGE) for number in as_list(n["v"]))),
    "ellipsis": lambda n: ...,
    "date": lambda n: dt.date(*_numbers(n["v"], 3)),
    "datetime": _as_datetime,
    "time": _as_time,
    "timedelta": lambda n: dt.timedelta(*_numbers(n["v"], 3)),
    "timezone": lambda n: _as_zone(as_list(n["z"])),
    "decimal": _as_decimal,
    "fraction": _as_fraction,
    "uuid": _as_uuid,
    "path": _as_path,
    "torch_name": lambda n: TORCH_NAMES[str(n["v"])],
    "npdtype": _as_numpy_dtype,
}
"""How to make each kind from its node; whatever these raise, the reader makes an ArchiveError."""
