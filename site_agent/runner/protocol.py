"""What travels on the socket between a runner (hostile) and its supervisor in the agent.

A frame is `kind u8, length u32` and that many bytes. `RESULT` alone announces a size (u64) and is followed by exactly
that many raw bytes. A runner speaks only for the job whose socket it holds: frames carry no identity.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from edif_mesh.errors import RunnerError

HEAD = struct.Struct("<BI")
SIZE = struct.Struct("<Q")
MAX_FRAME_BYTES = 256 << 10
MAX_JOB_HEAD_BYTES = 64 << 10


class Kind(IntEnum):
    """Frame kinds; the first three go to the runner, the others come from it."""

    JOB = 1
    """JSON: limits, env, payload size; followed by the payload's raw bytes."""
    READY = 10
    STARTED = 11
    LOG = 12
    RESULT = 13
    DONE = 14
    """JSON: cpu_ms, result_bytes."""
    FAILED = 15
    """JSON: code, text."""


FROM_RUNNER = frozenset({Kind.READY, Kind.STARTED, Kind.LOG, Kind.RESULT, Kind.DONE, Kind.FAILED})
_LENGTHS = {Kind.READY: 0, Kind.STARTED: 0, Kind.RESULT: SIZE.size}


@dataclass(frozen=True, slots=True)
class JobHead:
    """What the supervisor tells the runner besides the payload."""

    payload_bytes: int
    compressed: bool
    env: dict[str, str | None]
    max_payload_bytes: int
    memory_bytes: int
    cpu_s: int
    result_bytes: int
    log_bytes: int
    threads: int


def pack(kind: Kind, data: bytes = b"") -> bytes:
    """Return one frame."""
    return HEAD.pack(kind, len(data)) + data


def pack_json(kind: Kind, value: dict[str, Any]) -> bytes:
    """Return one frame with a JSON body."""
    return pack(kind, json.dumps(value).encode())


def check_head(raw: bytes) -> tuple[Kind, int]:
    """Return kind and length of a frame from a runner; raises RunnerError before anything is allocated."""
    number, length = HEAD.unpack(raw)
    if number not in FROM_RUNNER:
        raise RunnerError(f"The runner sent a frame of the unknown kind {number}.")
    kind = Kind(number)
    if length > MAX_FRAME_BYTES or length != _LENGTHS.get(kind, length):
        raise RunnerError(f"The runner sent a {kind.name} frame that claims {length} bytes.")
    return kind, length


def parse_failure(data: bytes) -> tuple[str, str]:
    """Return code and text of a FAILED frame, bounded; raises RunnerError."""
    value = _object(data)
    code, text = value.get("code"), value.get("text")
    if not isinstance(code, str) or not isinstance(text, str) or code not in RUNNER_CODES:
        raise RunnerError("The runner sent a failure without a known code.")
    return code, text


def parse_done(data: bytes) -> int:
    """Return the CPU milliseconds that the runner says it used; raises RunnerError."""
    cpu = _object(data).get("cpu_ms")
    if type(cpu) is not int or not 0 <= cpu < 1 << 40:
        raise RunnerError("The runner sent a malformed end.")
    return cpu


RUNNER_CODES = frozenset(
    {
        "user_error",
        "bad_payload",
        "payload_too_large",
        "unsupported_value",
        "result_too_large",
        "out_of_memory",
        "sandbox",
        "env",
    }
)
"""What a runner itself may say; everything else (time, crash, cancel) is the supervisor's to say."""


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunnerError("The runner sent a frame that is not JSON.") from error
    if not isinstance(value, dict):
        raise RunnerError("The runner sent a frame that is no object.")
    return value
