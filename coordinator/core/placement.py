"""Placement: filter, score, choose. Every refusal has a code and a sentence that says what would have to change."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable

from coordinator.core.room import Berth, berth
from coordinator.core.state import JobRecord, SiteRecord
from edif_mesh.domain.job import Failure
from edif_mesh.domain.site import ModelOffer, ModelState, SiteStatus, confines
from edif_mesh.wire.messages import Order, SiteVerdict

PERMANENT = frozenset({"audience", "model", "revision", "dtype", "task", "versions", "limits", "too_large", "sandbox"})
"""Reasons that waiting does not change: an order that every site refuses for one of them is refused at once."""

BUSY = frozenset({"no_slot", "no_memory", "no_room", "kept_full"})
"""Reasons that pass by themselves: when a running attempt ends, a model has been loaded for long enough, or kept results are deleted."""

ASSUMED_RUN_S = 2.0
TROUBLE_S = 10.0
"""Expected cost of one recent loss at a site: noticing it and running elsewhere."""


def judge(
    job: Order,
    record: SiteRecord,
    *,
    free_slots: int,
    free_memory_bytes: int,
    tried: bool,
    run_ms: float,
    busy: Collection[str] = (),
    leaving: Collection[str] = (),
    now_ms: int = 0,
    keeps_too_much: bool = False,
) -> SiteVerdict:
    """Return the site's verdict on the order: all its reasons, or its expected completion time in seconds.

    `busy` are the models of the attempts of ours that the site may hold, `leaving` those that get no more. A cold model costs
    its load time, and once more in proportion to the memory that others must leave for it: somebody will have to load them again.
    """
    offer = find_offer(job, record)
    found = berth(offer, record, busy, now_ms) if offer is not None else None
    reasons = tuple(_reasons(job, record, free_slots, free_memory_bytes, found))
    if not reasons and job.model.repo_id in leaving:
        text = f"{job.model.repo_id} has to make room at {record.site} for a model that was asked for before."
        reasons = (Failure("no_room", text),)
    if keeps_too_much:
        text = f"The mesh keeps as many bytes of results of {record.site} as it may; there is room again when some are deleted or old."
        reasons = (*reasons, Failure("kept_full", text))
    if reasons:
        return SiteVerdict(record.site, reasons)
    assert offer is not None
    assert found is not None
    load_s = 0.0 if found.warm else max(offer.load_ms, 1000) / 1000
    terms = {
        "load": load_s,
        "evict": load_s * found.plan.evicted_bytes / max(record.advert.models_bytes, 1),
        "run": (run_ms or ASSUMED_RUN_S * 1000) / 1000,
        "crowding": 0.5 * (1 - free_slots / max(record.advert.slots, 1)),
        "risk": TROUBLE_S * min(record.trouble, 10),
        "tried": 60.0 if tried else 0.0,
    }
    return SiteVerdict(record.site, (), round(sum(terms.values()), 3), {name: round(t, 3) for name, t in terms.items()})


def choose(job: JobRecord, verdicts: Iterable[SiteVerdict]) -> SiteVerdict | None:
    """Return the verdict with the least expected completion time, or None when no site fits now.

    A hash of job and attempt settles ties, so that equal sites share the work and equal inputs place equally.
    """
    fits = [verdict for verdict in verdicts if verdict.score_s is not None]
    if not fits:
        return None
    return min(fits, key=lambda v: (v.score_s, zlib.crc32(f"{job.job}/{job.attempt}/{v.site}".encode())))


def find_offer(order: Order, record: SiteRecord) -> ModelOffer | None:
    """Return the site's offer that fits the order's model, the loaded one first."""
    fits = [offer for offer in record.advert.models if _offer_fits(order, offer)]
    return min(fits, key=lambda offer: offer.state is not ModelState.LOADED, default=None)


def only_permanent(verdict: SiteVerdict) -> bool:
    """Return whether the site will never take this order as it is."""
    return any(reason.code in PERMANENT for reason in verdict.reasons)


def _offer_fits(order: Order, offer: ModelOffer) -> bool:
    model = order.model
    return (
        offer.repo_id == model.repo_id
        and offer.task == model.task
        and (model.revision is None or model.revision == offer.revision or model.revision in offer.aliases)
        and (model.dtype is None or model.dtype == offer.dtype)
    )


def _reasons(
    order: Order, record: SiteRecord, free_slots: int, free_memory_bytes: int, found: Berth | None
) -> Iterable[Failure]:
    advert, site = record.advert, record.site
    if order.audience.sites and site not in order.audience.sites:
        yield Failure("audience", f"Your order names other sites ({', '.join(order.audience.sites)}).")
    if order.audience.countries and advert.country not in order.audience.countries:
        yield Failure(
            "audience",
            f"{site} is in {advert.country or 'no stated country'}; your order allows {', '.join(order.audience.countries)}.",
        )
    yield from _model_reasons(order, record, found)
    most = advert.limits
    asked = order.limits
    for name, want, have in (
        ("seconds of run time", asked.wall_ms / 1000, most.wall_ms / 1000),
        ("GB of memory", asked.memory_bytes / 1e9, most.memory_bytes / 1e9),
        ("GB of result", asked.result_bytes / 1e9, most.result_bytes / 1e9),
        ("MB of printed text", asked.log_bytes / 1e6, most.log_bytes / 1e6),
        ("seconds of processor time", asked.cpu_ms / 1000, (most.cpu_ms or asked.cpu_ms) / 1000),
    ):
        if want > have:
            yield Failure("limits", f"{site} allows {have:,.2f} {name}; your order asks for {want:,.2f}.")
    if asked.memory_bytes > advert.memory_bytes:
        yield Failure(
            "too_large",
            f"{site} has {advert.memory_bytes / 1e9:,.2f} GB for runners; your order asks for {asked.memory_bytes / 1e9:,.2f} GB.",
        )
    if not advert.sandbox:
        yield Failure("sandbox", f"{site} cannot confine runners, so it runs nothing.")
    elif not confines(advert.sandbox, order.sandbox):
        yield Failure(
            "sandbox",
            f"{site} confines runners by the profile {advert.sandbox}; your order demands {order.sandbox[:40]} at least.",
        )
    if record.status in (SiteStatus.CORDONED, SiteStatus.DRAINING):
        yield Failure("cordoned", f"{site} takes no new work at present ({record.status.value.lower()}).")
    if record.status in (SiteStatus.SUSPECT, SiteStatus.LOST) or record.disconnected_at_ms is not None:
        yield Failure("silent", f"{site} has not been heard of for a while.")
    if free_slots <= 0:
        yield Failure("no_slot", f"All {advert.slots} slots of {site} are taken.")
    elif asked.memory_bytes > free_memory_bytes:
        yield Failure(
            "no_memory",
            f"{site} has {free_memory_bytes / 1e9:,.2f} GB free for runners now; your order asks for {asked.memory_bytes / 1e9:,.2f} GB.",
        )


def _model_reasons(order: Order, record: SiteRecord, found: Berth | None) -> Iterable[Failure]:
    advert, site, model = record.advert, record.site, order.model
    same = [offer for offer in advert.models if offer.repo_id == model.repo_id]
    if not same:
        yield Failure("model", f"{site} does not offer {model.repo_id}.")
        return
    offer = find_offer(order, record)
    if offer is None:
        have = "; ".join(f"revision {o.revision[:12] or 'unnamed'}, {o.dtype}, {o.task}" for o in same)
        code = "revision" if model.revision is not None else "dtype" if model.dtype is not None else "task"
        yield Failure(code, f"{site} offers {model.repo_id} only as {have}.")
        return
    assert found is not None
    if found.never:
        yield Failure("too_large", found.never)
    elif offer.state is ModelState.FAILED:
        yield Failure("load_failed", f"{site} could not load {model.repo_id}: {offer.detail or 'no reason given'}")
    elif found.not_now:
        yield Failure("no_room", found.not_now)
    mine, theirs = _series(order.client.nnsight), _series(advert.versions.nnsight)
    if mine and theirs and mine != theirs:
        yield Failure("versions", f"{site} runs nnsight {advert.versions.nnsight}; you have {order.client.nnsight}.")


def _series(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2]) if version else ()
