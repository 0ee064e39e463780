"""What a runner's supervisor tells the agent about one attempt, in order; exactly one terminal event ends it."""

from __future__ import annotations

from dataclasses import dataclass

from edif_mesh.domain.attempt import Receipt


@dataclass(frozen=True, slots=True)
class RunnerStarted:
    """The payload has arrived in the sandbox."""


@dataclass(frozen=True, slots=True)
class RunnerLog:
    """Text that the traced code printed."""

    text: str


@dataclass(frozen=True, slots=True)
class ResultChunk:
    """The next bytes of the archive, at most `chunk_bytes` of them; the job may still run."""

    data: bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ResultCut:
    """A chunk should end here; numbers of `element` bytes follow (0: unknown)."""

    element: int


@dataclass(frozen=True, slots=True)
class RunnerSucceeded:
    """Terminal: the archive is complete."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class RunnerFailed:
    """Terminal: no result; `code` says whose fault it is (see `admission.blame_of`), `text` is for the researcher."""

    code: str
    text: str
    receipt: Receipt


RunnerEvent = RunnerStarted | RunnerLog | ResultChunk | ResultCut | RunnerSucceeded | RunnerFailed
