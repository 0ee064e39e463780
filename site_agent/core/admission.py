"""What a site demands before it starts an attempt: one function a demand, each with its own code and sentence.

Two kinds of no. What the *sender* of the bundle may have altered or replayed is refused to the sender and changes
nothing (`refuse_bundle`): whoever can send bytes here must not be able to end an attempt. What the coordinator itself
has signed and this site will not run is declined (`decline`): remembered, and reported as DECLINED.
The signatures are verified by the shell, with the site's own trust store, before any of this.
"""

from __future__ import annotations

from collections.abc import Iterator

from edif_mesh.domain.ids import Digest
from edif_mesh.domain.job import Failure
from edif_mesh.domain.site import ModelState, SiteStatus, confines
from edif_mesh.wire.messages import Grant, Order, Role
from site_agent.core.events import GrantReceived, Signer
from site_agent.core.residence import plan_for, why_no_room
from site_agent.core.state import Now, State

SKEW_MS = 60_000
"""How far the clocks of the parties may be apart."""
MAX_WINDOW_MS = 7 * 86_400_000
"""The longest time window an order may have."""


def refuse_bundle(grant: Grant, digest: Digest, state: State) -> Failure | None:
    """Return why this bundle is not for this site, not whole, or from a deposed coordinator; or None."""
    if grant.order_digest != digest:
        return Failure("digest_mismatch", "The grant names other order bytes than those it came with.")
    if grant.site != state.policy.site:
        return Failure("wrong_site", f"This grant is for {grant.site}; this is {state.policy.site}.")
    if grant.epoch < state.epoch:
        return Failure(
            "stale_epoch", f"This grant is of epoch {grant.epoch}; a coordinator of epoch {state.epoch} has taken over."
        )
    return None


def refuse_replay(grant: Grant, state: State) -> Failure | None:
    """Return why this pair must not run (again), or None. A pair that is held or being reported is no replay."""
    key = (grant.job, grant.attempt)
    if key in state.held or key in state.unsent:
        return None
    if (grant.order_digest, grant.attempt) in state.seen:
        return Failure("replay", f"Attempt {grant.attempt} of {grant.job} was here before; none runs twice.")
    if key in state.barred:
        return Failure("stopped", f"Attempt {grant.attempt} of {grant.job} was stopped before its grant arrived.")
    return None


def decline(event: GrantReceived, state: State, now: Now) -> Failure | None:
    """Return the first reason why this site will not run what the coordinator has granted, or None."""
    return next((failure for failure in _reasons(event, state, now) if failure is not None), None)


def _reasons(event: GrantReceived, state: State, now: Now) -> Iterator[Failure | None]:
    order, grant = event.order, event.grant
    yield _bound(event)
    yield decline_window(grant, order, now)
    yield _federation(order, state)
    yield _signer(event.signer, order)
    yield _audience(order, state)
    yield _attempt(grant, order)
    yield _codec(order, state)
    yield _limits(order, state)
    yield _model(order, state)
    yield _capacity(order, state)
    yield _room(order, state, now)


def _bound(event: GrantReceived) -> Failure | None:
    if event.order.job != event.grant.job:
        return Failure("job_mismatch", f"The grant is for {event.grant.job}, its order for {event.order.job}.")
    return None


def decline_window(grant: Grant, order: Order, now: Now) -> Failure | None:
    """Return why neither order nor grant may start anything at this instant, or None; `SKEW_MS` are forgiven."""
    if order.expires_at_ms - order.not_before_ms > MAX_WINDOW_MS:
        return Failure("window_too_long", "The order is valid for more than 7 days; no order may be.")
    if now.wall_ms < order.not_before_ms - SKEW_MS:
        return Failure("not_yet_valid", f"The order is not valid before {order.not_before_ms} (Unix ms).")
    if now.wall_ms >= order.expires_at_ms + SKEW_MS:
        return Failure("order_expired", f"The order expired at {order.expires_at_ms} (Unix ms).")
    if now.wall_ms < grant.issued_at_ms - SKEW_MS:
        return Failure("grant_from_future", "The grant was issued in the future; check both clocks.")
    if now.wall_ms >= grant.expires_at_ms + SKEW_MS:
        return Failure("grant_expired", f"The grant expired at {grant.expires_at_ms} (Unix ms).")
    if grant.lease_ms <= 0:
        return Failure("no_lease", "The grant's lease is over before it begins.")
    return None


def _federation(order: Order, state: State) -> Failure | None:
    if order.federation != state.policy.federation:
        return Failure(
            "wrong_federation", f"The order is for the federation {order.federation}, not {state.policy.federation}."
        )
    return None


def _signer(signer: Signer, order: Order) -> Failure | None:
    if signer.role not in (Role.RESEARCHER, Role.GATEWAY):
        return Failure("wrong_role", f"{signer.name} is enrolled as {signer.role} and may not sign an order.")
    if signer.models and order.model.repo_id not in signer.models:
        return Failure("model_out_of_scope", f"The key of {signer.name} is not enrolled for {order.model.repo_id}.")
    return None


def _audience(order: Order, state: State) -> Failure | None:
    audience, policy = order.audience, state.policy
    if audience.sites and policy.site not in audience.sites:
        return Failure("not_in_audience", f"The researcher allows other sites only, not {policy.site}.")
    if audience.countries and policy.country.upper() not in {code.upper() for code in audience.countries}:
        return Failure(
            "not_in_audience",
            f"The researcher allows {', '.join(audience.countries)} only; {policy.site} is in {policy.country or '?'}.",
        )
    return None


def _attempt(grant: Grant, order: Order) -> Failure | None:
    if not 1 <= grant.attempt <= order.max_attempts:
        return Failure("too_many_attempts", f"Attempt {grant.attempt}; the order allows 1 to {order.max_attempts}.")
    return None


def _codec(order: Order, state: State) -> Failure | None:
    if order.payload.codec not in state.policy.codecs:
        return Failure("unsupported_codec", f"This site cannot open a payload of codec {order.payload.codec[:40]!r}.")
    if order.payload.size_bytes < 0 or order.payload.uncompressed_bytes < 0:
        return Failure("bad_payload", "The order gives its payload a negative size.")
    return None


def _limits(order: Order, state: State) -> Failure | None:
    for name in ("wall_ms", "memory_bytes", "result_bytes", "log_bytes"):
        asked, most = getattr(order.limits, name), getattr(state.policy.limits, name)
        if not 0 <= asked <= most:
            return Failure("over_site_limits", f"The order asks for {name} {asked}; this site allows 0 to {most}.")
    asked, most = order.limits.cpu_ms, state.policy.limits.cpu_ms  # 0 at the site: no limit but that of the wall time
    if asked < 0 or 0 < most < asked:
        return Failure("over_site_limits", f"The order asks for cpu_ms {asked}; this site allows 0 to {most or 'any'}.")
    return None


def _model(order: Order, state: State) -> Failure | None:
    wanted, model = order.model, state.models.get(order.model.repo_id)
    if model is None:
        return Failure("unknown_model", f"This site does not offer {wanted.repo_id}.")
    offer = model.offer
    if wanted.revision is not None and wanted.revision not in (offer.revision, *offer.aliases):
        return Failure(
            "wrong_revision", f"This site offers {offer.repo_id} at {offer.revision}, not at {wanted.revision[:80]}."
        )
    if wanted.dtype is not None and wanted.dtype != offer.dtype:
        return Failure("wrong_dtype", f"This site offers {offer.repo_id} in {offer.dtype}, not in {wanted.dtype[:20]}.")
    if wanted.task != offer.task:
        return Failure("wrong_task", f"This site offers {offer.repo_id} for {offer.task}, not for {wanted.task[:40]}.")
    if offer.state is ModelState.FAILED:
        return Failure("model_failed", f"{offer.repo_id} could not be loaded here: {offer.detail[:300]}")
    return None


def _capacity(order: Order, state: State) -> Failure | None:
    if state.status is not SiteStatus.ACTIVE:
        return Failure("not_active", f"This site is {state.status} and starts nothing.")
    if not state.sandbox:
        return Failure("no_sandbox", "The sandbox of this site failed its self-test; it runs nothing.")
    if not confines(state.sandbox, order.sandbox):
        return Failure(
            "weak_sandbox",
            f"This site confines runners by the profile {state.sandbox}; the order demands {order.sandbox[:40]} at least.",
        )
    if state.free_slots < 1:
        return Failure("no_free_slot", f"All {state.policy.slots} slots of this site are taken.")
    if order.limits.memory_bytes > state.free_memory_bytes:
        return Failure(
            "no_free_memory",
            f"The order needs {order.limits.memory_bytes} bytes beside the model; {state.free_memory_bytes} are free.",
        )
    return None


def _room(order: Order, state: State, now: Now) -> Failure | None:
    """The model is loaded, or on its way, or there is room for it."""
    model = state.models[order.model.repo_id]
    if model.loaded or model.queued or model.offer.state is ModelState.LOADING:
        return None
    if plan_for(order.model.repo_id, state, now).fits:
        return None
    return Failure("no_room", why_no_room(order.model.repo_id, state, now))
