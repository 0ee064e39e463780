"""Which models stay in memory, which may go, and whether another one fits: questions to the state, answered in plain values."""

from __future__ import annotations

from edif_mesh.domain.room import Plan, Resident, no_room, plan_room
from edif_mesh.domain.site import ModelState
from site_agent.core.state import Model, Now, State


def residents(state: State, now: Now, *, without: str = "") -> list[Resident]:
    """Return the models that take memory or have it promised, each with why it must stay."""
    busy = {held.order.model.repo_id for held in state.computing}
    return [
        Resident(repo_id, model.offer.takes_bytes, _kept(model, busy, now), model.used_at_ms)
        for repo_id, model in state.models.items()
        if model.promised and repo_id != without
    ]


def plan_for(repo_id: str, state: State, now: Now) -> Plan:
    """Return what must go before the model can be loaded; its own memory counts once, promised or not."""
    need = state.models[repo_id].offer.takes_bytes
    return plan_room(need, state.policy.models_bytes, residents(state, now, without=repo_id))


def why_no_room(repo_id: str, state: State, now: Now) -> str:
    """Return the arithmetic of a model that cannot be loaded now."""
    need, policy = state.models[repo_id].offer.takes_bytes, state.policy
    return no_room(repo_id, need, policy.models_bytes, residents(state, now, without=repo_id), policy.site)


def is_free(repo_id: str, state: State) -> bool:
    """Whether the memory that the model needs is free at this moment, not only promised."""
    occupied = sum(model.offer.takes_bytes for model in state.models.values() if model.occupies)
    budget = state.policy.models_bytes
    return budget <= 0 or occupied + state.models[repo_id].offer.takes_bytes <= budget


def evictable_bytes(state: State, now: Now) -> int:
    """Return the memory of the models that could be evicted now."""
    return sum(item.memory_bytes for item in residents(state, now) if not item.kept)


def _kept(model: Model, busy: set[str], now: Now) -> str:
    if model.offer.pinned:
        return "pinned"
    if model.queued or model.offer.state is ModelState.LOADING:
        return "being loaded"
    if model.offer.repo_id in busy:
        return "in use"
    left_ms = model.stays_until_ms - now.monotonic_ms
    return f"stays for {-(-left_ms // 1000)} s more" if left_ms > 0 else ""
