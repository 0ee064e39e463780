"""What a decision records. `evolve` folds a change into the state; the journal keeps the durable ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from edif_mesh.domain.ids import Epoch, JobId
from edif_mesh.domain.site import SiteStatus
from edif_mesh.wire.messages import Report
from site_agent.core.state import AttemptKey, Held, Model, Now, Pair, State

# ------------------------------------------------------------------------------------------------- durable


@dataclass(frozen=True, slots=True)
class PairSeen:
    """This order and attempt were answered here and must never start (again) before `until_ms`."""

    pair: Pair
    until_ms: int


@dataclass(frozen=True, slots=True)
class EpochRaised:
    """A coordinator of a higher term has spoken."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class AttemptOpened:
    """An attempt is held from now on."""

    held: Held


@dataclass(frozen=True, slots=True)
class AttemptBarred:
    """An attempt was stopped before its grant came."""

    key: AttemptKey
    until_ms: int


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt's last word: it is held no longer, and `report` waits until it is acknowledged."""

    report: Report


@dataclass(frozen=True, slots=True)
class ReportSettled:
    """The coordinator has recorded the reports of an attempt up to this sequence."""

    key: AttemptKey
    sequence: int


@dataclass(frozen=True, slots=True)
class OldForgotten:
    """Pairs and bars whose orders can no longer start are dropped."""

    before_ms: int


@dataclass(frozen=True, slots=True)
class Audited:
    """One line for the audit log: what was refused or done, and why."""

    what: str
    detail: str


Durable = PairSeen | EpochRaised | AttemptOpened | AttemptBarred | AttemptEnded | ReportSettled | OldForgotten | Audited

# ------------------------------------------------------------------------------------------------- volatile


@dataclass(frozen=True, slots=True)
class HeldChanged:
    """An attempt moves on, or its lease does."""

    held: Held


@dataclass(frozen=True, slots=True)
class Reported:
    """A report of progress waits for its acknowledgement; losing it in a crash costs nothing."""

    report: Report


@dataclass(frozen=True, slots=True)
class ModelChanged:
    """A model of the catalogue has another state."""

    model: Model


@dataclass(frozen=True, slots=True)
class ModelUsed:
    """An attempt has used the model until now."""

    repo_id: str
    at: Now


@dataclass(frozen=True, slots=True)
class AdvertNumbered:
    """The next advert has this number."""

    sequence: int


@dataclass(frozen=True, slots=True)
class AdvertAnswered:
    """The answer to this advert has been applied; older ones no longer count."""

    sequence: int


@dataclass(frozen=True, slots=True)
class JobsDropped:
    """Nothing is held any more of these deleted jobs; the next advert says so."""

    jobs: tuple[JobId, ...]


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """The site opens, or drains."""

    status: SiteStatus


Volatile = (
    HeldChanged | Reported | ModelChanged | ModelUsed | AdvertNumbered | AdvertAnswered | StatusChanged | JobsDropped
)
Change = Durable | Volatile


def evolve(state: State, change: Change) -> None:
    """Fold `change` into `state`."""
    match change:
        case PairSeen(pair, until_ms):
            state.seen[pair] = max(until_ms, state.seen.get(pair, 0))
        case EpochRaised(epoch):
            state.epoch = max(epoch, state.epoch)
        case AttemptOpened(held) | HeldChanged(held):
            state.held[held.key] = held
        case AttemptBarred(key, until_ms):
            state.barred[key] = until_ms
        case AttemptEnded(report) | Reported(report):
            _report(state, report)
        case ReportSettled(key, sequence):
            if state.unsent.get(key, sequence + 1) <= sequence:
                del state.unsent[key]
        case OldForgotten(before_ms):
            state.seen = {pair: until for pair, until in state.seen.items() if until >= before_ms}
            state.barred = {key: until for key, until in state.barred.items() if until >= before_ms}
        case Audited():
            pass
        case ModelChanged(model):
            state.models[model.offer.repo_id] = model
        case ModelUsed(repo_id, at):
            _use(state, repo_id, at)
        case AdvertNumbered(sequence):
            state.advert_sequence = sequence
        case AdvertAnswered(sequence):
            state.renewed_sequence = sequence
        case JobsDropped(jobs):
            state.dropped = jobs
        case StatusChanged(status):
            state.status = status
        case _:
            assert_never(change)


def _report(state: State, report: Report) -> None:
    key = (report.job, report.attempt)
    state.unsent[key] = report.sequence
    if report.status.terminal:
        state.held.pop(key, None)
    elif key in state.held:
        state.held[key] = replace(state.held[key], status=report.status, sequence=report.sequence)


def _use(state: State, repo_id: str, at: Now) -> None:
    if (model := state.models.get(repo_id)) is not None:
        offer = replace(model.offer, used_at_ms=at.wall_ms)
        state.models[repo_id] = replace(model, offer=offer, used_at_ms=at.monotonic_ms)
