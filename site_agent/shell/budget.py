"""How a site's memory is shared between loaded models and runners, and which models of the catalogue fit at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edif_mesh.config import SiteConfig
from edif_mesh.domain.room import Resident, never_fits
from edif_mesh.domain.site import Device, ModelState
from edif_mesh.errors import ConfigError
from site_agent import hardware
from site_agent.shell.catalogue import Entry, catalogue

_USABLE = 0.8
"""Of the memory that is free at start; the rest is for the agent, the system and what nobody has thought of."""

_SPARE = 1.25
"""A model may turn out larger than it was reckoned; that alone must not make others leave."""


@dataclass(frozen=True, slots=True)
class Shares:
    """What a site gives to loaded models together, and to runners together."""

    models_bytes: int
    runners_bytes: int


def offered(config: SiteConfig) -> tuple[tuple[Entry, ...], Shares]:
    """Return the catalogue as this machine can hold it, and the shares of its memory.

    Raises ConfigError, with the arithmetic, for settings that cannot be kept.
    """
    entries = catalogue(config)
    free, machine = hardware.free_memory_bytes(), hardware.memory_bytes()
    if any(entry.on_gpu for entry in entries):
        shares = share_gpus(config, entries, hardware.gpus(), free, machine)
    else:
        shares = share_memory(config, entries, free, machine)
    return within(entries, shares.models_bytes, config.site), shares


def share_memory(config: SiteConfig, entries: tuple[Entry, ...], free_bytes: int, machine_bytes: int) -> Shares:
    """Return what the settings give to models and runners; a 0 in them becomes a share of what is free now.

    Raises ConfigError when both together exceed the machine, or the pinned models the share of the models.
    """
    usable = int(free_bytes * _USABLE)
    wanted, kept, largest = _needed(entries)
    left = free_bytes - config.memory_bytes if config.memory_bytes else min(usable, largest)
    most = max(kept, usable // 2, left)
    models = config.models_bytes or min(wanted, most, max(0, machine_bytes - config.memory_bytes))
    _demand_room_for_pinned(entries, kept, models)
    if models + config.memory_bytes > machine_bytes or (wanted and not models):
        raise ConfigError(
            f"models_bytes {_gb(config.models_bytes)} + memory_bytes {_gb(config.memory_bytes)} leave no room: "
            f"this machine has {_gb(machine_bytes)}. Lower either."
        )
    return Shares(models, config.memory_bytes or max(0, usable - models))


def share_gpus(
    config: SiteConfig, entries: tuple[Entry, ...], gpus: Sequence[Device], free_bytes: int, machine_bytes: int
) -> Shares:
    """As `share_memory` where models lie on GPUs: models get a share of the GPUs' memory, runners one of the machine's.

    All GPUs count together, as a device map sees them; a model that fits into their sum and into none of them fails when it
    is loaded, with the driver's word. What GPUs have beside models is for the runners' own use of them. Not yet measured.
    """
    wanted, kept, _ = _needed(entries)
    free, total = sum(gpu.free_bytes for gpu in gpus), sum(gpu.memory_bytes for gpu in gpus)
    models = config.models_bytes or min(wanted, max(kept, int(free * _USABLE)))
    _demand_room_for_pinned(entries, kept, models)
    if models > total:
        raise ConfigError(
            f"models_bytes {_gb(models)} is more than the GPUs of this machine have: {_gb(total)}. Lower it, or load fewer models."
        )
    if config.memory_bytes > machine_bytes:
        raise ConfigError(
            f"memory_bytes {_gb(config.memory_bytes)} is more than this machine has: {_gb(machine_bytes)}. Lower it."
        )
    return Shares(models, config.memory_bytes or int(free_bytes * _USABLE))


def within(entries: tuple[Entry, ...], models_bytes: int, site: str) -> tuple[Entry, ...]:
    """Return the entries, those that cannot be loaded even when all others that may go have gone as FAILED."""
    pinned = [Resident(e.offer.repo_id, e.offer.takes_bytes) for e in entries if e.offer.pinned]
    return tuple(_marked(entry, pinned, models_bytes, site) for entry in entries)


def _marked(entry: Entry, pinned: list[Resident], models_bytes: int, site: str) -> Entry:
    problem = entry.problem or never_fits(entry.offer.repo_id, entry.offer.takes_bytes, models_bytes, pinned, site)
    if entry.problem or not problem:
        return entry
    return replace(
        entry, preload=False, problem=problem, offer=replace(entry.offer, state=ModelState.FAILED, detail=problem)
    )


def _needed(entries: tuple[Entry, ...]) -> tuple[int, int, int]:
    """What all models that can be loaded take together, with some to spare; what the pinned ones do; what the largest does."""
    loadable = [entry.offer for entry in entries if not entry.problem]
    sizes = [offer.takes_bytes for offer in loadable]
    return int(_SPARE * sum(sizes)), sum(o.takes_bytes for o in loadable if o.pinned), max(sizes, default=0)


def _demand_room_for_pinned(entries: tuple[Entry, ...], kept: int, models_bytes: int) -> None:
    if kept <= models_bytes:
        return
    pinned = [entry.offer for entry in entries if entry.offer.pinned and not entry.problem]
    listed = " + ".join(f"{offer.repo_id} {_gb(offer.takes_bytes)}" for offer in pinned)
    raise ConfigError(
        f"The pinned models need {_gb(kept)} together ({listed}), but models_bytes gives {_gb(models_bytes)} to all models. "
        "Raise models_bytes, or pin fewer."
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
