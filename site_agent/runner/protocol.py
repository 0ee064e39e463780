"""What travels on the socket between a runner (hostile) and its supervisor in the agent.

A frame is `kind u8, length u32` and that many bytes. A runner speaks only for the job whose socket it holds: frames carry no
identity. The archive leaves in `DATA` frames, some of them while the job still runs.

The whole conversation, as `Conversation` enforces it:

    METER READY | FAILED(sandbox)              before a job; the supervisor may then say WARM
    STARTED  ( LOG | DATA | CUT )*  ( DONE | FAILED )     for the one job
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from edif_mesh.errors import RunnerError

HEAD = struct.Struct("<BI")
MAX_FRAME_BYTES = 256 << 10
MAX_DATA_BYTES = 16 << 20
"""Of a DATA frame, which is never held whole."""
MAX_JOB_HEAD_BYTES = 64 << 10


class Kind(IntEnum):
    """Frame kinds; the first two go to the runner, the others come from it."""

    JOB = 1
    """JSON: limits, env, payload size; followed by the payload's raw bytes."""
    WARM = 2
    """Empty: nobody wants you yet, so run the warm-up trace. Not answered."""
    READY = 10
    STARTED = 11
    LOG = 12
    DONE = 14
    """Empty: the archive is complete; the runner then waits to be killed."""
    FAILED = 15
    """JSON: code, text."""
    METER = 16
    """Empty, the very first frame; its descriptor is the runner's own `/proc/self/smaps_rollup` (see `usage.Meter`)."""
    DATA = 17
    """The next bytes of the archive."""
    CUT = 18
    """One byte: a chunk should end here; numbers of so many bytes follow (0: unknown)."""


LOG_FRAME_COST_BYTES = 64
"""What a LOG frame counts against the log limit besides its text: empty frames are not free."""

FROM_RUNNER = frozenset({Kind.READY, Kind.STARTED, Kind.LOG, Kind.DATA, Kind.CUT, Kind.DONE, Kind.FAILED, Kind.METER})
_LENGTHS = {Kind.METER: 0, Kind.READY: 0, Kind.STARTED: 0, Kind.CUT: 1, Kind.DONE: 0}


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
    wire_dtype: str = ""


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
    if length > (MAX_DATA_BYTES if kind is Kind.DATA else MAX_FRAME_BYTES) or length != _LENGTHS.get(kind, length):
        raise RunnerError(f"The runner sent a {kind.name} frame that claims {length} bytes.")
    return kind, length


CUTS_FREE, CUT_COST_BYTES = 1024, 128 << 10
"""So many cuts are honoured whatever comes, then one for so many bytes: each costs the broker a message."""


class Conversation:
    """What a runner may say next, and how much of it; raises RunnerError for everything else. Pure: feed it frame heads."""

    def __init__(self, log_bytes: int, result_bytes: int) -> None:
        self._next = frozenset({Kind.STARTED, Kind.FAILED})
        self._log_left = log_bytes + LOG_FRAME_COST_BYTES + 4096
        self._most = result_bytes
        self.data_bytes = 0
        """Of the archive so far."""
        self._cuts = 0

    def accept(self, kind: Kind, length: int) -> None:
        """Take the head of the next frame."""
        if kind not in self._next:
            raise RunnerError(
                f"The runner sent {kind.name} where {' or '.join(sorted(k.name for k in self._next))} may come."
            )
        if kind is Kind.LOG:
            self._log_left -= length + LOG_FRAME_COST_BYTES
            if self._log_left < 0:
                raise RunnerError("The runner printed beyond its limit.")
        elif kind is Kind.DATA:
            self.data_bytes += length
            if length == 0 or self.data_bytes > self._most:
                raise RunnerError(f"The runner sent a result of {self.data_bytes} bytes; {self._most} are allowed.")
        elif kind is Kind.STARTED:
            self._next = frozenset({Kind.LOG, Kind.DATA, Kind.CUT, Kind.FAILED})
        elif kind is not Kind.CUT:
            self._next = frozenset()
        if kind is Kind.DATA:
            self._next |= {Kind.DONE}

    def cut(self) -> bool:
        """Take a CUT; whether it is honoured."""
        self._cuts += 1
        return self._cuts <= CUTS_FREE + self.data_bytes // CUT_COST_BYTES


def parse_failure(data: bytes, codes: frozenset[str]) -> tuple[str, str]:
    """Return code (one of `codes`) and printable text of a FAILED frame; raises RunnerError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunnerError("The runner sent a frame that is not JSON.") from error
    code, text = (value.get("code"), value.get("text")) if isinstance(value, dict) else (None, None)
    if not isinstance(code, str) or not isinstance(text, str) or code not in codes:
        raise RunnerError("The runner sent a failure without a known code.")
    return code, printable(text)


def printable(text: str) -> str:
    """Return `text` as every database and encoding takes it: without NUL and lone surrogates."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


SETUP_CODES = frozenset({"sandbox"})
"""What a runner may say instead of READY, before it has seen a stranger's byte."""
RUNNER_CODES = frozenset(
    {
        "user_error",
        "bad_payload",
        "payload_too_large",
        "unsupported_value",
        "result_too_large",
        "out_of_memory",
        "env",
    }
)
"""What a runner may say of its job; everything else (time, crash, cancel) is the supervisor's to say. None of these may
blame the site: hostile code can send them all."""
