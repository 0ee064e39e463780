"""Rules about models: when one is loaded, which ones make room for it, and what its progress, failure or end means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edif_mesh.domain.attempt import AttemptStatus, Blame
from edif_mesh.domain.job import Failure
from edif_mesh.domain.site import ModelOffer, ModelState
from site_agent.core.admission import SKEW_MS
from site_agent.core.attempts import end, progress, waiting_for
from site_agent.core.changes import Change, HeldChanged, ModelChanged
from site_agent.core.effects import Decision, Effect, EvictModel, LoadModel, SendAdvert, StartAttempt
from site_agent.core.residence import is_free, plan_for
from site_agent.core.state import Model, Now, State

MAX_BACKOFF_MS = 60_000


def load(repo_id: str, state: State, now: Now) -> Decision:
    """Have a model loaded: what must go for it goes, and its host starts at once, or when that memory is free.

    Empty when there is no room for it now.
    """
    plan, model = plan_for(repo_id, state, now), state.models[repo_id]
    if not plan.fits:
        return Decision()
    record: list[Change] = [ModelChanged(_evicting(state.models[name], repo_id)) for name in plan.evict]
    act: list[Effect] = [EvictModel(name) for name in plan.evict]
    if model.offer.state is ModelState.EVICTING:
        again = replace(model.offer, detail="it was just being unloaded, and comes back")
        record.append(ModelChanged(replace(model, queued=_last_place(state), offer=again)))
    elif is_free(repo_id, state):
        record.append(ModelChanged(_loading(model, "starting")))
        act.append(LoadModel(repo_id))
    else:
        going = [m.offer.repo_id for m in state.models.values() if m.offer.state is ModelState.EVICTING]
        detail = f"waiting for the memory of {', '.join((*plan.evict, *going)) or 'other models'}"
        record.append(ModelChanged(replace(_loading(model, detail), queued=_last_place(state))))
    return Decision(tuple(record), (*act, SendAdvert()))


def tend_models(state: State, now: Now) -> Decision:
    """Start what waits for memory that is free now, and load what is to be loaded without being asked for."""
    record: list[Change] = []
    act: list[Effect] = []
    seen = replace(state, models=dict(state.models))
    for repo_id in _in_turn(seen):
        done = _tend(repo_id, seen, now)
        for change in done.record:
            assert isinstance(change, ModelChanged)
            seen.models[change.model.offer.repo_id] = change.model
        record += done.record
        act += done.act
    return Decision(tuple(record), tuple(act))


def progressed(state: State, repo_id: str, detail: str, now: Now) -> Decision:
    """Tell those who wait for the model how far it is."""
    model = state.models[repo_id]
    if model.offer.detail == detail:
        return Decision()
    record: list[Change] = [ModelChanged(replace(model, offer=replace(model.offer, detail=detail)))]
    act: list[Effect] = []
    for held in waiting_for(state, repo_id):
        told = progress(state, held.key, AttemptStatus.LOADING, now, detail)
        record += told.record
        act += told.act
    return Decision(tuple(record), tuple(act))


def loaded(offer: ModelOffer, state: State, now: Now) -> Decision:
    """Its host is ready: start those who wait for it."""
    policy = state.policy
    offer = replace(
        offer,
        state=ModelState.LOADED,
        used_at_ms=now.wall_ms,
        evictable_at_ms=0 if offer.pinned else now.wall_ms + policy.min_residency_ms,
    )
    until = now.monotonic_ms + policy.min_residency_ms
    model = state.models[offer.repo_id]
    model = replace(model, offer=offer, queued=0, used_at_ms=now.monotonic_ms, stays_until_ms=until)
    record: list[Change] = [ModelChanged(model)]
    act: list[Effect] = []
    for held in waiting_for(state, offer.repo_id):
        if now.wall_ms >= held.order.expires_at_ms + SKEW_MS:
            late = Failure("order_expired", "The order expired while its model was being loaded.")
            ended = end(state, held.key, AttemptStatus.RELEASED, now, failure=late, detail=late.text)
            record += ended.record
            act += ended.act
        else:
            ready = replace(held, started=True, load_ms=offer.load_ms)
            record.append(HeldChanged(ready))
            act.append(StartAttempt(ready))
    return Decision(tuple(record), (*act, SendAdvert()))


def failed(state: State, repo_id: str, text: str, now: Now) -> Decision:
    """It could not be loaded: those who wait for it go to another site."""
    model = state.models[repo_id]
    record: list[Change] = [_failed(model, text, ModelState.FAILED, now)]
    act: list[Effect] = [SendAdvert()]
    failure = Failure("load_failed", f"{repo_id} could not be loaded: {text}")
    for held in waiting_for(state, repo_id):
        ended = end(state, held.key, AttemptStatus.FAILED, now, failure=failure, blame=Blame.SITE)
        record += ended.record
        act += ended.act
    return Decision(tuple(record), tuple(act))


def evicted(state: State, repo_id: str) -> Decision:
    """Its memory is free: it can be loaded again, and whoever waits for the memory is loaded now."""
    model = state.models[repo_id]
    detail = "starting again" if model.queued else ""
    offer = replace(
        model.offer, state=ModelState.LOADING if model.queued else ModelState.LOADABLE, detail=detail, evictable_at_ms=0
    )
    gone = replace(model, offer=offer)
    record: list[Change] = [ModelChanged(gone)]
    act: list[Effect] = []
    seen = replace(state, models={**state.models, repo_id: gone})
    for change, effect in _start_queued(seen):
        record.append(change)
        act.append(effect)
    return Decision(tuple(record), (*act, SendAdvert()))


def host_lost(state: State, repo_id: str, text: str, now: Now) -> Decision:
    """Its process has died: attempts that ran on it are lost, and it may be loaded again."""
    model = state.models[repo_id]
    leaving = ModelState.EVICTING if model.offer.state is ModelState.EVICTING else ModelState.LOADABLE
    record: list[Change] = [_failed(model, text, leaving, now)]
    act: list[Effect] = []
    failure = Failure("host_lost", f"The process that held {repo_id} died: {text}")
    for held in state.computing:
        if held.order.model.repo_id == repo_id and held.started:
            ended = end(state, held.key, AttemptStatus.FAILED, now, failure=failure, blame=Blame.SITE, kill="host_lost")
            record += ended.record
            act += ended.act
    return Decision(tuple(record), (*act, SendAdvert()))


def _tend(repo_id: str, state: State, now: Now) -> Decision:
    model = state.models[repo_id]
    if model.queued:
        return _wait(model, state, now)
    if model.offer.state not in (ModelState.LOADABLE, ModelState.FAILED) or model.retry_at_ms > now.monotonic_ms:
        return Decision()
    if model.offer.pinned or waiting_for(state, repo_id):
        return load(repo_id, state, now)
    if model.preload and (plan := plan_for(repo_id, state, now)).fits and not plan.evict:
        return load(repo_id, state, now)
    if model.offer.state is ModelState.FAILED:
        return Decision((ModelChanged(replace(model, offer=replace(model.offer, state=ModelState.LOADABLE))),))
    return Decision((ModelChanged(replace(model, preload=False)),)) if model.preload else Decision()


def _wait(model: Model, state: State, now: Now) -> Decision:
    """A model that waits for memory: start it when that is free, or have more evicted where it was reckoned too low."""
    repo_id = model.offer.repo_id
    if model.offer.state is ModelState.EVICTING:
        return Decision()
    if is_free(repo_id, state):
        return Decision((ModelChanged(_loading(model, "starting")),), (LoadModel(repo_id), SendAdvert()))
    plan = plan_for(repo_id, state, now)
    if not plan.evict:
        return Decision()
    record = tuple(ModelChanged(_evicting(state.models[name], repo_id)) for name in plan.evict)
    return Decision(record, (*(EvictModel(name) for name in plan.evict), SendAdvert()))


def _start_queued(state: State) -> Iterator[tuple[Change, Effect]]:
    """Yield the start of every queued model whose memory is free, one after the other; folds them into `state`."""
    for repo_id in _in_turn(state):
        model = state.models[repo_id]
        if model.queued and model.offer.state is ModelState.LOADING and is_free(repo_id, state):
            state.models[repo_id] = _loading(model, "starting")
            yield ModelChanged(state.models[repo_id]), LoadModel(repo_id)


def _last_place(state: State) -> int:
    return 1 + max(model.queued for model in state.models.values())


def _in_turn(state: State) -> list[str]:
    """Who waits for memory in the order of asking, then the pinned models, then the others."""
    models = state.models
    return sorted(
        models, key=lambda name: (not models[name].queued, models[name].queued, not models[name].offer.pinned)
    )


def _loading(model: Model, detail: str) -> Model:
    return replace(model, queued=0, offer=replace(model.offer, state=ModelState.LOADING, detail=detail))


def _evicting(model: Model, repo_id: str) -> Model:
    detail = f"makes room for {repo_id}"
    offer = replace(model.offer, state=ModelState.EVICTING, detail=detail, evictable_at_ms=0)
    return replace(model, preload=False, offer=offer)


def _failed(model: Model, text: str, state: ModelState, now: Now) -> ModelChanged:
    """Count a failure: the first retry comes at once for a lost host, later ones back off up to a minute."""
    failures = model.failures + 1
    wait = 0 if failures == 1 and state is ModelState.LOADABLE else min(MAX_BACKOFF_MS, 500 << min(failures, 8))
    offer = replace(model.offer, state=state, detail=text[:300], evictable_at_ms=0)
    return ModelChanged(replace(model, offer=offer, failures=failures, retry_at_ms=now.monotonic_ms + wait))
