"""Rules about sites: adverts, silence, disconnection, the coordinator's own deafness."""

from __future__ import annotations

from dataclasses import replace

from coordinator.core.attempts import lose
from coordinator.core.decision import Draft, Reply
from coordinator.core.events import AdvertReceived, SiteDisconnected
from coordinator.core.keeping import dropped_at, to_drop
from coordinator.core.schedule import lease_end
from coordinator.core.state import AttemptRecord, SiteRecord
from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.ids import SiteId
from edif_mesh.domain.job import Failure
from edif_mesh.domain.site import SiteStatus
from edif_mesh.wire.messages import Advert, AttemptLease, LeaseRenewed

_SPOKEN = frozenset({SiteStatus.ACTIVE, SiteStatus.CORDONED, SiteStatus.DRAINING})
_MISSING_ADVERTS = 2


def advert_received(draft: Draft, event: AdvertReceived) -> None:
    """Believe the newest advert, renew the leases of what it lists, and notice what is gone for certain."""
    advert = event.advert
    known = draft.site(advert.site)
    if known is not None and known.advert.boot == advert.boot and advert.sequence < known.advert.sequence:
        return
    rebooted = known is not None and known.advert.boot != advert.boot
    if rebooted and known is not None and advert.issued_at_ms < known.advert.issued_at_ms:
        return  # the last words of an older run of this agent
    status = advert.status if advert.status in _SPOKEN else SiteStatus.CORDONED
    record = SiteRecord(advert.site, status, advert, draft.now_ms, None, known.trouble if known else 0)
    draft.change_site(record, durable=known is None or rebooted or _differs(known.advert, advert))
    repeated = known is not None and not rebooted and advert.sequence == known.advert.sequence
    dropped_at(draft, advert.site, advert.dropped)
    leases = _renew(draft, advert, rebooted=rebooted, repeated=repeated)
    if event.reply_to:
        answer = LeaseRenewed(
            site=advert.site,
            epoch=draft.state.epoch,
            advert_sequence=advert.sequence,
            issued_at_ms=draft.now_ms,
            lease_ms=draft.state.policy.lease_ms,
            attempts=tuple(leases),
            drop=to_drop(draft, advert.site),
        )
        draft.send(Reply(event.reply_to, answer))


def site_disconnected(draft: Draft, event: SiteDisconnected) -> None:
    """Remember it: the site has a short grace to return before its attempts move."""
    site = draft.site(event.site)
    if site is not None and site.disconnected_at_ms is None and site.status is not SiteStatus.LOST:
        draft.change_site(replace(site, disconnected_at_ms=draft.now_ms), durable=False)


def tend_sites(draft: Draft, *, frozen: bool) -> None:
    """Mark the silent sites; move the attempts of those that are gone for certain."""
    policy, now = draft.state.policy, draft.now_ms
    for site in list(draft.sites()):
        gone_ms = now - site.disconnected_at_ms if site.disconnected_at_ms is not None else -1
        if gone_ms >= policy.disconnect_grace_ms and site.status is not SiteStatus.LOST and not frozen:
            draft.change_site(replace(site, status=SiteStatus.LOST))
            _lose_all(draft, site.site, "disconnected", "its connection to the broker is gone")
            continue
        silent_ms = now - site.seen_at_ms
        if frozen:
            continue
        if silent_ms >= policy.lease_ms and site.status is not SiteStatus.LOST:
            draft.change_site(replace(site, status=SiteStatus.LOST))
        elif silent_ms >= policy.suspect_ms and site.status in _SPOKEN:
            draft.change_site(replace(site, status=SiteStatus.SUSPECT))


def mass_silence(draft: Draft) -> bool:
    """Return whether more than half of at least three sites are silent together: the fault is then central."""
    heard = [site for site in draft.sites() if site.status is not SiteStatus.LOST]
    silent = [site for site in heard if draft.now_ms - site.seen_at_ms >= draft.state.policy.suspect_ms]
    return len(heard) >= 3 and 2 * len(silent) > len(heard)


def _renew(draft: Draft, advert: Advert, *, rebooted: bool, repeated: bool) -> list[AttemptLease]:
    listed = {(a.job, a.attempt) for a in advert.attempts}
    leases = []
    for attempt in draft.active_at(advert.site):
        key = (attempt.job, attempt.attempt)
        job = draft.job(attempt.job)
        current = job is not None and not job.terminal and job.attempt == attempt.attempt
        if key in listed:
            draft.change_attempt(
                attempt,
                missing=0,
                answered=True,
                boot=advert.boot,
                deadline_at_ms=lease_end(draft.state.policy, draft.now_ms) if current else attempt.deadline_at_ms,
            )
            if current and not attempt.status.terminal:
                leases.append(AttemptLease(attempt.job, attempt.attempt))
        elif rebooted and attempt.boot is not None and attempt.boot != advert.boot:
            _gone(draft, attempt, "agent_restarted", "its agent was restarted")
        elif attempt.answered and not repeated and _was_heard_before(draft, attempt):
            missing = attempt.missing + 1
            if missing >= _MISSING_ADVERTS:
                _gone(draft, attempt, "forgotten", "it no longer holds the attempt")
            else:
                draft.change_attempt(attempt, missing=missing)
    return leases


def _was_heard_before(draft: Draft, attempt: AttemptRecord) -> bool:
    """Whether the attempt was last heard of long enough ago that this advert cannot have crossed that word on its way."""
    heard_at_ms = attempt.deadline_at_ms - (lease_end(draft.state.policy, 0))
    return draft.now_ms - heard_at_ms >= draft.state.policy.disconnect_grace_ms


def _gone(draft: Draft, attempt: AttemptRecord, code: str, why: str) -> None:
    if attempt.stop_reason is not None:
        draft.change_attempt(attempt, stop_reason=None)
    elif attempt.status is not AttemptStatus.LOST:
        lose(draft, attempt, Failure(code, f"{attempt.site} lost it: {why}."))


def _lose_all(draft: Draft, site: SiteId, code: str, why: str) -> None:
    for attempt in draft.active_at(site):
        _gone(draft, attempt, code, why)


def _differs(old: Advert, new: Advert) -> bool:
    """Whether an advert says something that a restarted coordinator should still know."""
    return _lasting(old) != _lasting(new)


def _lasting(advert: Advert) -> tuple[object, ...]:
    """What an advert says, less what changes with every attempt: writing that down would cost more than it is worth."""
    models = tuple(replace(offer, used_at_ms=0) for offer in advert.models)
    return (
        models, advert.slots, advert.status, advert.limits, advert.country, advert.sandbox, advert.versions,
        advert.models_bytes,
    )  # fmt: skip
