"""Bytes <-> messages: JSON, strict, at most `MAX_MESSAGE_BYTES`, no duplicate keys, one dataclass for each `kind`."""

from __future__ import annotations

import json
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from edif_mesh.errors import WireError
from edif_mesh.wire.messages import Message

MAX_MESSAGE_BYTES = 512 << 10
"""Below the broker's `max_payload`; a list of jobs is the largest message."""
MAX_DEPTH = 32

M = TypeVar("M")
_CLASSES: dict[str, type[Any]] = {cls.__dataclass_fields__["kind"].default: cls for cls in get_args(Message)}


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {cls: TypeAdapter(cls) for cls in get_args(Message)}


def kinds() -> dict[str, type]:
    """Return every message class by its kind."""
    return dict(_CLASSES)


def encode(message: Message) -> bytes:
    """Return the message as JSON bytes."""
    return _ADAPTERS[type(message)].dump_json(message)


def decode(raw: bytes | str) -> Message:
    """Return the message in `raw` (JSON, with `kind`).

    Raises:
        WireError: too long, not JSON, duplicate keys, unknown kind, or fields that do not fit.
    """
    value = load_json(raw)
    kind = value.get("kind") if isinstance(value, dict) else None
    cls = _CLASSES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise WireError(f"This is no message of ours: its kind is {str(kind)[:40]!r}.")
    message: Message = _validate(cls, value)
    return message


def decode_as(cls: type[M], raw: bytes | str) -> M:
    """Return the message in `raw`, which must be of class `cls`; raises WireError like `decode`."""
    message = decode(raw)
    if not isinstance(message, cls):
        raise WireError(f"Expected a {cls.__name__}, got a {type(message).__name__}.")
    return message


def load_json(raw: bytes | str) -> Any:
    """Parse JSON strictly: bounded length and nesting, no duplicate keys, no NaN; raises WireError."""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise WireError(f"A message of {len(raw)} bytes is over the limit of {MAX_MESSAGE_BYTES}.")
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"This is not JSON as we send it: {error}") from error
    _check_depth(value)
    return value


def _validate(cls: type[Any], value: Any) -> Any:
    try:
        # JSON mode: strings become enums, lists become tuples; strict: nothing else is coerced.
        return _ADAPTERS[cls].validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WireError(f"A {cls.__name__} with a bad field: {where}: {first['msg']}") from error
    except ValueError as error:  # a lone surrogate, which JSON can escape and UTF-8 cannot hold
        raise WireError(f"A {cls.__name__} that cannot be encoded: {error}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise WireError(f"A message nested deeper than {MAX_DEPTH}.")
