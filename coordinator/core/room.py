"""Room for models at a site, as the coordinator sees it: the site's advert, and what our own grants have changed since.

The rule is the site's own (`edif_mesh.domain.room`). A model with an attempt of ours counts as in use, also while the advert
does not show it yet: so a site that has room for one more model is not granted two.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from coordinator.core.state import SiteRecord
from edif_mesh.domain.room import Plan, Resident, never_fits, no_room, plan_room
from edif_mesh.domain.site import ModelOffer, ModelState

_IN_USE = "in use"


@dataclass(frozen=True, slots=True)
class Berth:
    """What a model finds at a site."""

    warm: bool
    """It is loaded, and no grant of ours makes it leave."""
    plan: Plan = Plan()
    never: str = ""
    """The arithmetic, when it could not be loaded even if everything else that may go were gone."""
    not_now: str = ""
    """The arithmetic, when what is loaded must stay for now."""


def berth(offer: ModelOffer, record: SiteRecord, busy: Collection[str], now_ms: int) -> Berth:
    """Return what the offered model finds; `busy` are the repo ids of the attempts that the site may hold of ours."""
    advert = record.advert
    budget, need = advert.models_bytes, offer.takes_bytes
    pinned = [Resident(o.repo_id, o.takes_bytes) for o in advert.models if o.pinned]
    never = "" if offer.state is ModelState.LOADED else never_fits(offer.repo_id, need, budget, pinned, record.site)
    there = _settled(record, busy, now_ms)
    if any(item.repo_id == offer.repo_id for item in there):
        return Berth(offer.state is ModelState.LOADED, never=never)
    plan = plan_room(need, budget, there)
    return Berth(
        False,
        plan=plan,
        never=never,
        not_now="" if plan.fits else no_room(offer.repo_id, need, budget, there, record.site),
    )


def memory_in_use(record: SiteRecord, busy: Collection[str]) -> int:
    """Return what the models take that must all be loaded at once: pinned ones and those with attempts of ours."""
    return sum(offer.takes_bytes for offer in record.advert.models if offer.pinned or offer.repo_id in busy)


def _settled(record: SiteRecord, busy: Collection[str], now_ms: int) -> list[Resident]:
    """What stays at the site once it has made room for all that we have granted."""
    advert = record.advert
    there = [
        Resident(offer.repo_id, offer.takes_bytes, _kept(offer, record, busy, now_ms), offer.used_at_ms)
        for offer in advert.models
        if offer.pinned or offer.repo_id in busy or offer.state in (ModelState.LOADED, ModelState.LOADING)
    ]
    # What turned out larger than it was reckoned stays all the same: only what we have granted since makes others leave.
    loaded = sum(o.takes_bytes for o in advert.models if o.state in (ModelState.LOADED, ModelState.LOADING))
    leaving = plan_room(0, advert.models_bytes and max(advert.models_bytes, loaded), there).evict
    return [item for item in there if item.repo_id not in leaving]


def in_the_way(offer: ModelOffer, record: SiteRecord, busy: Collection[str], now_ms: int) -> frozenset[str]:
    """Return the models in use that would have to go for this one, had they nothing more to do; empty when that is no help.

    Were they given ever more work, a model that is not loaded would wait for ever at a site that is never idle.
    """
    there = [replace(i, kept="") if i.kept == _IN_USE else i for i in _settled(record, busy, now_ms)]
    plan = plan_room(offer.takes_bytes, record.advert.models_bytes, there)
    return frozenset(plan.evict) & frozenset(busy)


def _kept(offer: ModelOffer, record: SiteRecord, busy: Collection[str], now_ms: int) -> str:
    if offer.pinned:
        return "pinned"
    if offer.state is ModelState.LOADING or (offer.repo_id in busy and offer.state is not ModelState.LOADED):
        return "being loaded"
    # Both instants are of the site's clock; only the span since its advert is of ours.
    left_ms = offer.evictable_at_ms - record.advert.issued_at_ms - (now_ms - record.seen_at_ms)
    if left_ms > 0:
        return f"stays for {-(-left_ms // 1000)} s more"
    return _IN_USE if offer.repo_id in busy else ""
