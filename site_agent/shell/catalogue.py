"""The site's catalogue: each configured model resolved offline to the revision that this machine has."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from edif_mesh.config import ModelConfig, SiteConfig
from edif_mesh.domain.site import ModelOffer, ModelState
from edif_mesh.errors import EdifError
from edif_mesh.models import hub_cache, resolve_model, weights_bytes
from site_agent.hosting.spec import ModelSpec

_BYTES_A_SECOND = 500 << 20
"""For the first estimate of a load time; later ones are measured."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: what is offered and how a host loads it. `problem` says why it cannot be loaded; empty when it can."""

    offer: ModelOffer
    spec: ModelSpec
    preload: bool
    problem: str = ""


def catalogue(config: SiteConfig) -> tuple[Entry, ...]:
    """Return every model of the settings; those that are not on this machine as FAILED, with what to do."""
    return tuple(_entry(model, hf_cache(config)) for model in config.models)


def hf_cache(config: SiteConfig) -> Path:
    """Return the Hugging Face cache that hosts read."""
    return config.hf_cache or hub_cache()


def _entry(model: ModelConfig, cache: Path) -> Entry:
    revision, weights, problem, dtype = model.revision or "", 0, "", model.dtype
    aliases: tuple[str, ...] = ()
    try:
        found = resolve_model(model.repo_id, model.revision, model.path, cache)
        revision, aliases, weights = found.revision, found.aliases, weights_bytes(found.path)
        problem = "" if weights else f"There are no weights in {found.path}."
        dtype = model.dtype if model.dtype != "auto" else _dtype(found.path)
    except (EdifError, OSError, ValueError, struct.error) as error:
        problem = str(error)
    offer = ModelOffer(
        repo_id=model.repo_id,
        revision=revision,
        task=model.task,
        dtype=dtype,
        state=ModelState.FAILED if problem else ModelState.LOADABLE,
        weights_bytes=weights,
        load_ms=5_000 + weights * 1000 // _BYTES_A_SECOND,
        detail=problem,
        aliases=aliases,
    )
    spec = ModelSpec(
        repo_id=model.repo_id,
        revision=revision if model.path is None else None,
        resolved_revision=revision,
        path=str(model.path) if model.path is not None else None,
        task=model.task,
        dtype=model.dtype,
    )
    return Entry(offer, spec, model.preload and not problem, problem)


def _dtype(folder: Path) -> str:
    """Return what `auto` will load, as far as the configuration says; the host's own word replaces it."""
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
