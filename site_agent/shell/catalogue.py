"""The site's catalogue: each configured model resolved offline to the revision that this machine has."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from edif_mesh.config import ModelConfig, SiteConfig
from edif_mesh.domain.site import ModelOffer, ModelState
from edif_mesh.errors import ModelLoadError
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
    if config.hf_cache is not None:
        return config.hf_cache
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"


def _entry(model: ModelConfig, cache: Path) -> Entry:
    try:
        folder, revision, aliases = _resolve(model, cache)
        weights = _weights_bytes(folder)
        problem = "" if weights else f"There are no weights in {folder}."
        dtype = model.dtype if model.dtype != "auto" else _dtype(folder)
    except ModelLoadError as error:
        revision, aliases, weights, problem, dtype = model.revision or "", (), 0, str(error), model.dtype
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


def _resolve(model: ModelConfig, cache: Path) -> tuple[Path, str, tuple[str, ...]]:
    """Return the folder, its revision and the names that mean it; raises ModelLoadError with what to type."""
    if model.path is not None:
        if not (model.path / "config.json").is_file():
            raise ModelLoadError(f"There is no model in {model.path}: config.json is missing.")
        text = (model.path / "config.json").read_bytes() + str(_weights_bytes(model.path)).encode()
        return model.path, hashlib.sha256(text).hexdigest()[:40], ("main",)
    base = cache / f"models--{model.repo_id.replace('/', '--')}"
    wanted = model.revision or "main"
    reference = base / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    folder = base / "snapshots" / commit
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"{model.repo_id} ({wanted}) is not in the Hugging Face cache {cache}. Type: "
            f"HF_HUB_CACHE={cache} hf download {model.repo_id}" + (f" --revision {wanted}" if model.revision else "")
        )
    names = base / "refs"
    aliases = tuple(
        sorted(
            str(path.relative_to(names))
            for path in (names.rglob("*") if names.is_dir() else ())
            if path.is_file() and path.read_text().strip() == commit
        )
    )
    return folder, commit, aliases


def _weights_bytes(folder: Path) -> int:
    for pattern in ("*.safetensors", "*.bin", "*.gguf"):
        if found := sum(path.stat().st_size for path in folder.glob(pattern)):
            return found
    return 0


def _dtype(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{folder / 'config.json'} cannot be read: {error}") from error
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
