"""`edif status`, `edif sites`, `edif models list`."""

from __future__ import annotations

import asyncio

from edif_mesh.cli.exit_codes import OK
from edif_mesh.cli.render import ago, as_json, gigabytes, say, table
from edif_mesh.client.mesh import Mesh
from edif_mesh.domain.site import Device
from edif_mesh.wire.messages import MeshView, SiteView


def show_status(*, json: bool) -> int:
    """One screen: federation, coordinator, sites."""
    view, monitor = asyncio.run(_view())
    if json:
        as_json(view)
        return OK
    say(f"Federation {view.federation}, coordinator term {view.epoch}: {view.queued} queued, {view.running} running.")
    table(
        ("SITE", "STATE", "SLOTS FREE", "MODELS LOADED", "SEEN"),
        [
            (
                s.site,
                s.status.value,
                f"{s.free_slots} of {s.slots}",
                ", ".join(m.repo_id for m in s.models if m.state == "LOADED") or "-",
                ago(s.seen_at_ms),
            )
            for s in view.sites
        ],
        empty="No site has joined yet.",
    )
    if monitor:
        say(f"Web page: {monitor}")
    return OK


def show_sites(*, json: bool) -> int:
    """Everything that the sites advertise."""
    view, _ = asyncio.run(_view())
    if json:
        as_json(view.sites)
        return OK
    table(
        (
            "SITE",
            "STATE",
            "COUNTRY",
            "DEVICES",
            "SLOTS FREE",
            "FOR RUNNERS",
            "FOR MODELS",
            "SANDBOX",
            "NNSIGHT",
            "SEEN",
        ),
        [
            (
                s.site,
                s.status.value,
                s.country or "-",
                ", ".join(f"{_device(d)} {gigabytes(d.memory_bytes)}" for d in s.devices) or "-",
                f"{s.free_slots} of {s.slots}",
                f"{gigabytes(s.free_memory_bytes)} free of {gigabytes(s.memory_bytes)}",
                _for_models(s),
                s.sandbox.partition(":")[0] or "none",
                s.versions.nnsight or "-",
                ago(s.seen_at_ms),
            )
            for s in view.sites
        ],
        empty="No site has joined yet.",
    )
    return OK


def show_models(*, json: bool) -> int:
    """Every model with the sites that offer it."""
    view, _ = asyncio.run(_view())
    offers = [(offer, site) for site in view.sites for offer in site.models]
    if json:
        as_json([{"site": site.site, "model": offer} for offer, site in offers])
        return OK
    table(
        (
            "MODEL",
            "REVISION",
            "TASK",
            "DTYPE",
            "QUANTIZED",
            "ATTENTION",
            "WEIGHTS",
            "SITE",
            "STATE",
            "PINNED",
            "USED",
            "WHAT",
        ),
        [
            (
                o.repo_id,
                o.revision[:12],
                o.task,
                o.dtype,
                o.quantization or "-",
                o.attn_implementation or "-",
                gigabytes(o.weights_bytes),
                s.site,
                o.state.value,
                "yes" if o.pinned else "-",
                ago(o.used_at_ms),
                o.detail or "-",
            )
            for o, s in sorted(offers, key=lambda pair: (pair[0].repo_id, pair[1].site))
        ],
        empty="No site offers a model yet.",
    )
    return OK


def _for_models(site: SiteView) -> str:
    """How much of what the site gives to models is free, and how much could be."""
    if not site.models_bytes:
        return "-"
    could_go = f", {gigabytes(site.evictable_bytes)} could go" if site.evictable_bytes else ""
    return f"{gigabytes(site.free_models_bytes)} free{could_go}, of {gigabytes(site.models_bytes)}"


def _device(device: Device) -> str:
    """A GPU by its name; a CPU's name is long and decides little."""
    return device.name if device.kind != "cpu" else "CPU"


async def _view() -> tuple[MeshView, str]:
    async with await Mesh.connect(name="cli") as mesh:
        return await mesh.view(), mesh.config.monitor_url
