"""Room for models at a site: what stays, what may go, and the arithmetic in words. The one rule of site and coordinator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that takes memory at a site, or has it promised."""

    repo_id: str
    memory_bytes: int
    kept: str = ""
    """Why it cannot be evicted now, in words; empty: it can."""
    used_at_ms: int = 0
    """When an attempt last used it, on any one clock."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which models must go before another can be loaded."""

    evict: tuple[str, ...] = ()
    evicted_bytes: int = 0
    short_bytes: int = 0
    """What is missing even when all that may go has gone; 0: the model fits."""

    @property
    def fits(self) -> bool:
        """Whether the model can be loaded, once `evict` has gone."""
        return self.short_bytes == 0


def plan_room(need_bytes: int, budget_bytes: int, residents: Sequence[Resident]) -> Plan:
    """Return what to evict so that `need_bytes` more fit into the budget (0: there is no bound).

    Of all that may go, as much as possible stays, the most recently used first: so the least recently used go, and none
    that need not. Nothing is evicted for a model that would not fit all the same.
    """
    over = need_bytes + sum(item.memory_bytes for item in residents) - budget_bytes
    if budget_bytes <= 0 or over <= 0:
        return Plan()
    chosen = sorted((item for item in residents if not item.kept), key=lambda item: (item.used_at_ms, item.repo_id))
    freed = sum(item.memory_bytes for item in chosen)
    if freed < over:
        return Plan(short_bytes=over - freed)
    for item in reversed(list(chosen)):
        if freed - item.memory_bytes >= over:
            chosen.remove(item)
            freed -= item.memory_bytes
    return Plan(tuple(item.repo_id for item in chosen), freed)


def never_fits(repo_id: str, need_bytes: int, budget_bytes: int, pinned: Iterable[Resident], site: str) -> str:
    """Return the arithmetic when a model cannot be loaded whatever else goes; empty when it can. `pinned`: the others."""
    stay = [item for item in pinned if item.repo_id != repo_id]
    if budget_bytes <= 0 or need_bytes + sum(item.memory_bytes for item in stay) <= budget_bytes:
        return ""
    less = f", of which {', '.join(f'{_gb(item.memory_bytes)} stay with {item.repo_id} (pinned)' for item in stay)}"
    return f"{repo_id} needs {_gb(need_bytes)}; {site} gives {_gb(budget_bytes)} to models{less if stay else ''}."


def no_room(repo_id: str, need_bytes: int, budget_bytes: int, residents: Sequence[Resident], site: str) -> str:
    """Return the arithmetic of a model that cannot be loaded now."""
    free = budget_bytes - sum(item.memory_bytes for item in residents)
    taken = ", ".join(f"{item.repo_id} {_gb(item.memory_bytes)} ({item.kept or 'could go'})" for item in residents)
    return (
        f"{repo_id} needs {_gb(need_bytes)}; {site} gives {_gb(budget_bytes)} to models, "
        f"of which {_gb(max(0, free))} are free: {taken}."
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
