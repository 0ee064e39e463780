"""What would keep this site from working: one finding a line, each with what to type."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from edif_mesh.config import DirectConfig, SiteConfig, read_password
from edif_mesh.errors import EdifError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import TrustStore
from edif_mesh.results.direct_link import DirectLink
from edif_mesh.transport.nats_bus import connect
from edif_mesh.wire.messages import DirectEndpoint, Role
from site_agent import hardware
from site_agent.direct.certificate import certificate
from site_agent.direct.keeper import certificate_file, kept_folder
from site_agent.hosting.process import readable_folders
from site_agent.runner.selftest import choose
from site_agent.shell.budget import Shares, offered
from site_agent.shell.catalogue import Entry, hf_cache

Finding = tuple[str, str]
"""`ok`, `warn` or `fail`, and a sentence."""


async def checks(config: SiteConfig) -> AsyncIterator[Finding]:
    """Yield the findings in the order in which an operator would mend them."""
    for finding in (*_identity(config), *_sandbox(config), *_hardware(config), *_models(config), _state(config)):
        yield finding
    yield await _broker(config)
    if (direct := config.direct) is not None:
        for finding in await asyncio.to_thread(lambda: [*_direct(config, direct)]):
            yield finding


def _identity(config: SiteConfig) -> list[Finding]:
    findings: list[Finding] = []
    try:
        key = PrivateKey.load(config.key_file)
        findings.append(("ok", f"key {key.id} of {config.site}, federation {config.federation}"))
    except EdifError as error:
        return [("fail", str(error))]
    try:
        trust = TrustStore.load(config.trust_file)
    except EdifError as error:
        return [*findings, ("fail", str(error))]
    if trust.federation != config.federation:
        return [*findings, ("fail", f"{config.trust_file} is of the federation {trust.federation}.")]
    count = {role: sum(1 for item in trust.identities() if item.role is role) for role in Role}
    if not count[Role.COORDINATOR]:
        findings.append(("fail", f"{config.trust_file} names no coordinator: nothing could be granted here."))
    people = count[Role.RESEARCHER] + count[Role.GATEWAY]
    findings.append(("ok" if people else "warn", f"{people} researchers and gateways are trusted here"))
    return findings


def _sandbox(config: SiteConfig) -> list[Finding]:
    """Every profile, tried; a profile that is not the one to be used may well not hold."""
    choice = choose(config, try_all=True)
    found: list[Finding] = [
        ("ok", f"sandbox {profile} {f'does not hold: {problem}' if problem else 'holds'}")
        for profile, problem in choice.findings.items()
    ]
    return [*found, ("ok" if choice.profile else "fail", choice.verdict())]


def _hardware(config: SiteConfig) -> list[Finding]:
    found: list[Finding] = [
        ("ok", f"{device.kind} {device.name}, {device.free_bytes / 1e9:.1f} of {device.memory_bytes / 1e9:.1f} GB free")
        for device in hardware.devices()
    ]
    cores = os.cpu_count() or 1
    if config.slots * config.threads > cores:
        found.append(
            ("warn", f"{config.slots} slots x {config.threads} threads are more than the {cores} cores; lower either")
        )
    return found


def _models(config: SiteConfig) -> list[Finding]:
    """Each model, and whether memory suffices for them and for what orders may ask."""
    try:
        entries, shares = offered(config)
    except EdifError as error:
        return [("fail", str(error))]
    found: list[Finding] = []
    for entry in entries:
        found.append(("fail", entry.problem) if entry.problem else ("ok", _described(entry)))
        found += _closed_to_runners(config, entry)
    if not found:
        return [("fail", "no model is configured: add a [[models]] table with a repo_id")]
    return [*found, *_memory(config, entries, shares)]


def _described(entry: Entry) -> str:
    offer = entry.offer
    where = f"on {offer.device}" if offer.device not in ("", "cpu") else ""
    held = [offer.quantization, offer.dtype, offer.attn_implementation, "pinned" if offer.pinned else "", where]
    return (
        f"{offer.repo_id} {offer.revision[:12]} {offer.weights_bytes / 1e9:.2f} GB of weights, "
        f"{offer.takes_bytes / 1e9:.2f} GB in memory, {', '.join(part for part in held if part)}"
    )


def _memory(config: SiteConfig, entries: tuple[Entry, ...], shares: Shares) -> list[Finding]:
    at_start = sum(entry.offer.takes_bytes for entry in entries if entry.preload)
    found: list[Finding] = [
        (
            "ok",
            f"{shares.models_bytes / 1e9:.2f} GB for loaded models, {shares.runners_bytes / 1e9:.2f} GB for runners",
        )
    ]
    if at_start > shares.models_bytes:
        found.append(
            (
                "warn",
                f"the models with preload need {at_start / 1e9:.2f} GB together: those that fit are loaded at start, in the "
                "order of the settings, the others when they are asked for",
            )
        )
    if config.limits.memory_bytes > shares.runners_bytes:
        found.append(
            (
                "warn",
                f"an order may ask for {config.limits.memory_bytes / 1e9:.1f} GB, but only {shares.runners_bytes / 1e9:.1f} GB "
                "are set aside for runners: set limits.memory_bytes lower, or memory_bytes higher",
            )
        )
    return found


def _closed_to_runners(config: SiteConfig, entry: Entry) -> list[Finding]:
    """Adapters that an agent of root reads and its runners, which are other users, do not; weights are loaded by the host."""
    if os.geteuid() != 0:
        return []
    folders = [Path(folder) for folder in readable_folders(entry.spec, hf_cache(config))]
    adapters = [path for folder in folders for path in folder.glob("**/adapter_*") if path.exists()]
    closed = [path for path in adapters if not path.stat().st_mode & 0o004]
    text = "runners have user ids of their own and cannot load {0} for a request: chmod o+r {0}"
    return [("warn", text.format(path)) for path in closed]


def _state(config: SiteConfig) -> Finding:
    folder = config.state_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return "fail", f"{folder} cannot be written; the journal would go to {config.state_dir}"
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    return ("ok" if free > 10 << 30 else "warn"), f"{free / 1e9:.1f} GB free for journal and waiting results"


def _direct(config: SiteConfig, direct: DirectConfig) -> Iterator[Finding]:
    """The endpoint: its certificate, whether it answers at the address that researchers are told, and its disk."""
    try:
        digest = certificate(certificate_file(config), config.site)
        yield "ok", f"results are served with the certificate {digest[:16]}, {direct.keep_hours} hours long"
    except EdifError as error:
        yield "fail", str(error)
        return
    try:
        DirectLink(DirectEndpoint(direct.url, digest)).close()
        yield "ok", f"{direct.url} answers with this certificate, from here"
    except OSError as error:
        reason = f"{direct.url} does not answer from here ({error}): is the agent running, and the port let through?"
        yield "warn", f"{reason} Results leave by the broker meanwhile"
    except EdifError as error:
        yield "fail", f"{direct.url}: {error} Something else answers there, or ends TLS in front of it"
    folder = next(path for path in (config.state_dir, *config.state_dir.absolute().parents) if path.exists())
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    kept = sum(file.stat().st_size for file in kept_folder(config).glob("*.data"))
    enough = free + kept > direct.keep_bytes
    text = f"{kept / 1e9:.1f} of {direct.keep_bytes / 1e9:.1f} GB for kept results used, {free / 1e9:.1f} GB free on that disk"
    yield ("ok", text) if enough else ("warn", f"{text}: set direct.keep_bytes lower")


async def _broker(config: SiteConfig) -> Finding:
    broker = config.broker
    try:
        link = await connect(
            broker.url,
            name=f"site {config.site} check",
            user=broker.user,
            password=read_password(broker),
            timeout_ms=3_000,
        )
    except EdifError as error:
        return "fail", str(error)
    await link.close()
    return "ok", f"broker {broker.url} answers"
