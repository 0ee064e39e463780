"""Adverts: every few seconds and soon after a change; each answer extends the leases that it names."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from edif_mesh.errors import EdifError, TransportError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import TrustStore
from edif_mesh.transport.ports import Bus
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import open_envelope, seal
from edif_mesh.wire.messages import Advert, AttemptRef, LeaseRenewed
from site_agent import hardware
from site_agent.core.events import AdvertDue, LeaseAnswered
from site_agent.core.residence import evictable_bytes
from site_agent.core.state import Now, State
from site_agent.shell.loop import AgentLoop, read_clocks

log = logging.getLogger(__name__)

_GATHER_S = 0.2
"""Changes within this time share one advert."""
_MAX_IN_FLIGHT = 4
_DEVICES_EVERY_S = 5.0


class Heartbeat:
    """Sends adverts until closed; `answered` is set when the coordinator has answered one."""

    def __init__(self, loop: AgentLoop, trust: TrustStore, key: PrivateKey, bus: Bus) -> None:
        self._loop, self._trust, self._key, self._bus = loop, trust, key, bus
        self._wake = asyncio.Event()
        self._in_flight: set[asyncio.Task[None]] = set()
        self.answered = asyncio.Event()
        self._looked_at = -_DEVICES_EVERY_S

    def soon(self) -> None:
        """Something changed."""
        self._wake.set()

    async def run(self) -> None:
        """Beat for ever."""
        period_s = self._loop.state.policy.advert_ms / 1000
        while True:
            self._wake.clear()
            if len(self._in_flight) < _MAX_IN_FLIGHT:
                task = asyncio.create_task(self._beat(), name="advert")
                self._in_flight.add(task)
                task.add_done_callback(self._in_flight.discard)
            # Never wait_for: in Python 3.11 it swallows a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period_s if self.answered.is_set() else min(period_s, 0.5)):
                    await self._wake.wait()
                await asyncio.sleep(_GATHER_S)

    async def close(self) -> None:
        """Drop what is in flight."""
        for task in list(self._in_flight):
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)

    async def _look_at_devices(self) -> None:
        """Read the free memory of the devices again, not at every advert: asking a GPU's driver takes its time."""
        now = asyncio.get_running_loop().time()
        if now - self._looked_at >= _DEVICES_EVERY_S:
            self._looked_at = now
            self._loop.state.devices = await asyncio.to_thread(hardware.devices)

    async def _beat(self) -> None:
        state = self._loop.state
        try:
            await self._look_at_devices()
            await self._loop.handle(AdvertDue())
            now = read_clocks()
            envelope = seal(build_advert(state, now), self._key)
            raw = await self._bus.request(
                subjects.advert(state.policy.site), envelope.encode(), timeout_ms=max(1_000, state.policy.advert_ms)
            )
            renewal = open_envelope(raw, LeaseRenewed, self._trust, read_clocks().wall_ms).message
        except TransportError as error:
            log.debug("advert unanswered", extra={"text": str(error)})
            return
        except EdifError as error:
            log.warning("an answer to an advert was not believed", extra={"code": error.code, "text": str(error)})
            return
        except Exception:
            log.exception("advert failed")
            return
        await self._loop.handle(LeaseAnswered(renewal, now.monotonic_ms))
        self.answered.set()


def build_advert(state: State, now: Now) -> Advert:
    """Return what the site says of itself now."""
    policy = state.policy
    return Advert(
        site=policy.site,
        boot=state.boot,
        sequence=state.advert_sequence,
        issued_at_ms=now.wall_ms,
        valid_ms=3 * policy.advert_ms,
        status=state.status,
        country=policy.country,
        slots=policy.slots,
        free_slots=state.free_slots,
        memory_bytes=policy.memory_bytes,
        free_memory_bytes=state.free_memory_bytes,
        devices=state.devices,
        models=tuple(model.offer for model in state.models.values()),
        versions=state.versions,
        limits=policy.limits,
        attempts=tuple(AttemptRef(held.job, held.attempt, held.status) for held in state.held.values()),
        sandbox=state.sandbox,
        note=_note(state),
        models_bytes=policy.models_bytes,
        free_models_bytes=state.free_models_bytes,
        evictable_bytes=evictable_bytes(state, now),
        dropped=state.dropped,
    )


def _note(state: State) -> str:
    """What the operator should see: the agent's own trouble, and models that were loaded anew for an alarm."""
    alarms = [model.offer.detail for model in state.models.values() if model.loaded and model.offer.detail]
    return " ".join([*filter(None, [state.note, state.trouble]), *alarms])
