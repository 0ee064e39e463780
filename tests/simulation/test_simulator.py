"""The production core of the coordinator, tens of thousands of decisions a seed, under faults; and bugs planted into it."""

from __future__ import annotations

import inspect
import os
from types import FunctionType, ModuleType

import pytest

from coordinator.core import attempts, decision, jobs, keeping, placement, schedule
from coordinator.core.state import SiteRecord
from edif_mesh.domain.ids import AttemptNumber
from tests.simulation.world import Violation, World, run

STEPS = 8_000
SEEDS = range(100, 108)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_invariant_breaks_and_everything_ends(seed: int) -> None:
    world = run(seed, STEPS)
    assert world.steps >= STEPS
    for what in (
        "lost",
        "site crashed",
        "coordinator crashed at rest",
        "own link",
        "cut off",
        "cancelled",
        "started",
        "evicted",
    ):
        assert world.counts[what] > 0, f"the world knew no {what!r}: it tested nothing"
    assert len(world.committed) > 50


def test_a_seed_gives_the_same_world_again() -> None:
    one, other = World(7), World(7)
    one.run(3_000)
    other.run(3_000)
    assert one.trace.hexdigest() == other.trace.hexdigest()


@pytest.mark.slow
def test_many_seeds() -> None:
    for seed in range(int(os.environ.get("SIM_FIRST", "1000")), int(os.environ.get("SIM_LAST", "1060"))):
        run(seed, 20_000)


PLANTED: list[tuple[str, ModuleType, str, str]] = [
    ("chunks that another result uses are deleted", keeping, "\n        and not borrowers(draft.state, job.job, draft.now_ms)", ""),
    ("a deletion that got no answer is not asked again", keeping, "    for name in list(draft.state.deleting):", "    for name in ():"),
    ("a site is not told to drop", keeping, "return tuple(wanted[:MAX_DROPS])", "return ()"),
    ("no fence: a report of an ended attempt is applied", attempts, "    if attempt.status.terminal:\n        changes", "    attempt = replace(attempt, status=AttemptStatus.RUNNING)\n    if False:\n        changes"),
    ("an older report undoes a newer one", attempts, "if report.sequence > attempt.sequence:", "if True:"),
    ("a lost attempt is forgotten", attempts, "if job is not None and not job.terminal and job.attempt == attempt.attempt:\n        again", "if False:\n        again"),
    ("a declined job is not queued again", attempts, "_no_more_work(draft, site)\n        again(draft, job, site, said, counts=False)", "_no_more_work(draft, site)"),
    ("a failed host's job is not queued again", attempts, "        _trouble(draft, site, +1)\n        again(draft, job, site, said, counts=True)", "        _trouble(draft, site, +1)"),
    ("an attempt number is used twice", schedule, "AttemptNumber(job.attempt + 1)", "AttemptNumber(max(1, job.attempt))"),
    ("attempts are numbered from two", schedule, "AttemptNumber(job.attempt + 1)", "AttemptNumber(job.attempt + 2)"),
    ("a change raises no version", decision, "version=job.version + 1", "version=job.version"),
    ("a job's transition leaves no audit line", decision, 'self.audit(f"job {new.status.value.lower()}", job=new, text=new.text)', "pass"),
    ("a repeated order starts the job anew", jobs, "    if known is not None:", "    if False:"),
    ("an ended job can be cancelled", jobs, "    if not job.terminal:\n        reason", "    if True:\n        reason"),
    ("an expired order of an ended job ends it again", jobs, "if job is not None and not job.terminal:", "if job is not None:"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "code", "bug"), [p[1:] for p in PLANTED], ids=[p[0] for p in PLANTED])
def test_a_planted_bug_is_caught(module: ModuleType, code: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, module, code, bug)
    with pytest.raises(Violation):
        for seed in range(200, 206):
            run(seed, STEPS)


def test_a_record_that_misses_a_change_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = World._keep

    def forgetful(self: World, change: object) -> None:
        if not isinstance(change, decision.AttemptChanged) or change.record.attempt != AttemptNumber(1):
            keep(self, change)  # type: ignore[arg-type]

    monkeypatch.setattr(World, "_keep", forgetful)
    with pytest.raises(Violation, match="recovered"):
        run(200, STEPS)


def test_a_room_without_the_ledger_of_own_grants_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        schedule, "room_at", lambda draft, site: schedule.Room(site.advert.slots, site.advert.memory_bytes)
    )
    with pytest.raises(Violation, match="slots"):
        run(200, STEPS)


def test_grants_without_the_ledger_of_models_in_use_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    room_at = schedule.room_at

    def forgetful(draft: decision.Draft, site: SiteRecord) -> schedule.Room:
        room = room_at(draft, site)
        return schedule.Room(room.slots, room.memory_bytes)

    monkeypatch.setattr(schedule, "room_at", forgetful)
    with pytest.raises(Violation, match="bytes to models, and those in use need"):
        for seed in range(200, 206):
            run(seed, STEPS)


def test_a_placement_below_the_demanded_sandbox_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "confines", lambda advertised, least: True)
    with pytest.raises(Violation, match="demands namespaced and was placed at"):
        run(200, STEPS)


def plant(monkeypatch: pytest.MonkeyPatch, module: ModuleType, code: str, bug: str) -> None:
    """Change the module's source and give its functions the changed code, wherever they were imported to."""
    source = inspect.getsource(module)
    assert code in source, "the code has changed: plant the bug where it is now"
    namespace: dict[str, object] = {"__name__": module.__name__}
    exec(compile(source.replace(code, bug, 1), str(module.__file__), "exec"), namespace)
    for owner, changed in [(module, namespace), *((c, vars(namespace[n])) for n, c in _classes(module))]:
        for name, function in list(vars(owner).items()):
            new = changed.get(name) if isinstance(changed, dict) else changed[name]
            if (
                isinstance(function, FunctionType)
                and isinstance(new, FunctionType)
                and function.__module__ == module.__name__
            ):
                if function.__code__.co_freevars == new.__code__.co_freevars:
                    monkeypatch.setattr(function, "__code__", new.__code__)


def _classes(module: ModuleType) -> list[tuple[str, type]]:
    return [(n, c) for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
