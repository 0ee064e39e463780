"""What a decision causes: the effects that the shell carries out once the record is kept."""

from __future__ import annotations

from dataclasses import dataclass

from edif_mesh.domain.ids import JobId
from edif_mesh.domain.job import Failure
from edif_mesh.wire.messages import Report
from site_agent.core.changes import Change
from site_agent.core.state import AttemptKey, Held


@dataclass(frozen=True, slots=True)
class StartAttempt:
    """Run it: fetch the payload, lend a runner of the loaded model."""

    held: Held


@dataclass(frozen=True, slots=True)
class KillAttempt:
    """End its runner, now; its last report is already on the way."""

    key: AttemptKey
    reason: str


@dataclass(frozen=True, slots=True)
class SendReport:
    """Send it until it is acknowledged."""

    report: Report


@dataclass(frozen=True, slots=True)
class LoadModel:
    """Start a host."""

    repo_id: str


@dataclass(frozen=True, slots=True)
class EvictModel:
    """End its host; `ModelEvicted` follows when the process and its runners are gone."""

    repo_id: str


@dataclass(frozen=True, slots=True)
class SendAdvert:
    """Tell the coordinator at once."""


@dataclass(frozen=True, slots=True)
class DropResult:
    """The coordinator has this attempt's last report: what is kept of its result here may go."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class DropJobs:
    """Delete all that is held of these jobs: their owners want that."""

    jobs: tuple[JobId, ...]


Effect = StartAttempt | KillAttempt | SendReport | LoadModel | EvictModel | SendAdvert | DropResult | DropJobs


@dataclass(frozen=True, slots=True)
class Decision:
    """Record first, then act. `refusal` is the answer to whoever asked; None means `Received`."""

    record: tuple[Change, ...] = ()
    act: tuple[Effect, ...] = ()
    refusal: Failure | None = None
