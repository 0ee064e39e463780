"""The broker's word that a site agent's connection is gone: it comes within tens of milliseconds of a `kill -9`.

Needs a second connection as a user of the broker's system account (`system_user` in the settings). A site is recognised by
its connection's name, `site NAME control`, and believed only for a broker user whose name begins with `site`: another
client could choose the same name, but not that user. Heartbeats go on telling where this is not configured.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from coordinator.core.events import Event, SiteDisconnected
from edif_mesh.domain.ids import SiteId, is_name
from edif_mesh.transport.ports import Bus, Incoming

log = logging.getLogger(__name__)

SUBJECT = "$SYS.ACCOUNT.*.DISCONNECT"


async def watch_disconnects(system: Bus, happened: Callable[[Event], None]) -> None:
    """Call `happened(SiteDisconnected)` for every site agent that the broker has lost."""

    async def received(incoming: Incoming) -> None:
        site = parse_disconnect(incoming.data)
        if site is not None:
            log.warning("site disconnected", extra={"site": site})
            happened(SiteDisconnected(site))

    await system.subscribe(SUBJECT, received)


def parse_disconnect(data: bytes) -> SiteId | None:
    """Return the site whose control connection a DISCONNECT event is about, or None for anything else."""
    try:
        client = json.loads(data)["client"]
        kind, site, role = client["name"].split(" ")
        user = client["user"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if kind != "site" or role != "control" or not is_name(site) or not str(user).startswith("site"):
        return None
    return SiteId(site)
