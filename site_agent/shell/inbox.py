"""What the coordinator sends: opened with the site's own trust store, taken through the core, then answered."""

from __future__ import annotations

import logging

from edif_mesh.domain.job import Failure
from edif_mesh.errors import ConfigError, EdifError, NotConnectedError, TrustError, WireError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import TrustStore
from edif_mesh.transport.ports import Bus, Incoming
from edif_mesh.wire.codec import decode_as, load_json
from edif_mesh.wire.envelope import envelope_digest, open_envelope, seal
from edif_mesh.wire.messages import Grant, Order, PlaceAttempt, Received, Refusal, StopAttempt
from site_agent.core.events import BadOrderReceived, Distrusted, Event, GrantReceived, Signer, StopReceived
from site_agent.shell.loop import AgentLoop, read_clocks

log = logging.getLogger(__name__)


class Inbox:
    """Answers `PlaceAttempt` and `StopAttempt`: `Received` once journaled, else a signed `Refusal`. Never raises."""

    def __init__(self, loop: AgentLoop, trust: TrustStore, key: PrivateKey, bus: Bus) -> None:
        self._loop, self._trust, self._key, self._bus = loop, trust, key, bus

    async def __call__(self, incoming: Incoming) -> None:
        """Take one message, whatever its bytes are."""
        try:
            refusal = await self._loop.handle(self._open(incoming.data))
        except Exception:
            log.exception("a message could not be handled")
            refusal = Failure("internal", "The site could not handle this message; its log says why.")
        if not incoming.reply:
            return
        state = self._loop.state
        answer: Received | Refusal = (
            Received(state.policy.site, state.boot, read_clocks().wall_ms) if refusal is None else Refusal(refusal)
        )
        try:
            await self._bus.publish(incoming.reply, seal(answer, self._key).encode())
        except NotConnectedError:
            log.info("an answer could not be sent; the coordinator will ask again")

    def _open(self, raw: bytes) -> Event:
        try:
            value = load_json(raw)
            if isinstance(value, dict) and value.get("kind") == "place_attempt":
                return self._open_bundle(raw)
            stop = open_envelope(raw, StopAttempt, self._fresh_trust(), read_clocks().wall_ms)
            return StopReceived(stop.message)
        except (WireError, TrustError) as error:
            log.warning("refused", extra={"code": error.code, "text": str(error)})
            return Distrusted(_failure(error), f"({len(raw)} bytes)")

    def _open_bundle(self, raw: bytes) -> Event:
        bundle, now_ms, trust = decode_as(PlaceAttempt, raw), read_clocks().wall_ms, self._fresh_trust()
        grant = open_envelope(bundle.grant, Grant, trust, now_ms).message
        digest = envelope_digest(bundle.order)
        try:
            order = open_envelope(bundle.order, Order, trust, now_ms)
        except (WireError, TrustError) as error:
            return BadOrderReceived(grant, digest, _failure(error))
        who = order.identity
        return GrantReceived(grant, order.message, digest, Signer(who.name, who.role, who.models, order.key))

    def _fresh_trust(self) -> TrustStore:
        """Read the store again when its file has changed: a revocation counts at once. A broken file changes nothing."""
        try:
            self._trust.refresh()
        except ConfigError as error:
            log.error("trust store unreadable", extra={"text": str(error)})
        return self._trust


def _failure(error: EdifError) -> Failure:
    return Failure(error.code, str(error))
