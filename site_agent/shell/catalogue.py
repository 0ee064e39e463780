"""The site's catalogue: each configured model resolved offline to the revision that this machine has."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from edif_mesh.config import ModelConfig, SiteConfig
from edif_mesh.domain.site import ModelOffer, ModelState
from edif_mesh.errors import EdifError
from edif_mesh.models import hub_cache, resolve_model
from site_agent import hardware
from site_agent.hosting.footprint import checkpoint_quantization, estimate_weights_bytes, held_dtype, memory_bytes
from site_agent.hosting.spec import ModelSpec

_PACKAGES = {
    **dict.fromkeys(("nf4", "fp4", "int8"), ("bitsandbytes", "bitsandbytes")),
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""What a setting needs: the module that transformers imports, and the package to install."""
_BYTES_A_SECOND = 500 << 20
"""For the first estimate of a load time; later ones are measured."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: what is offered and how a host loads it. `problem` says why it cannot be loaded; empty when it can."""

    offer: ModelOffer
    spec: ModelSpec
    preload: bool
    problem: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether its weights lie in the memory of GPUs."""
        return self.spec.device != "cpu"


def catalogue(config: SiteConfig) -> tuple[Entry, ...]:
    """Return every model of the settings; those that are not on this machine as FAILED, with what to do."""
    gpus = hardware.cuda_devices()
    return tuple(_entry(model, hf_cache(config), *place(model, config.device, gpus)) for model in config.models)


def hf_cache(config: SiteConfig) -> Path:
    """Return the Hugging Face cache that hosts read."""
    return config.hf_cache or hub_cache()


def place(model: ModelConfig, device: str, gpus: int) -> tuple[str, str]:
    """Return the device that `model` is loaded on at a site whose setting is `device`, and why that cannot be ("" when it can).

    `auto` is the first of `gpus` GPUs, and the CPU where there is none; a device map then has nothing to spread over.
    """
    wanted = model.device or device
    if wanted == "auto":
        return ("cuda:0" if gpus else "cpu"), ""
    if wanted == "cpu":
        return "cpu", ""
    wanted = "cuda:0" if wanted == "cuda" else wanted
    if int(wanted.partition(":")[2]) < gpus:
        return wanted, ""
    there = (
        f"there are {gpus} of them" if gpus else "there is no GPU with a driver, or torch was installed without CUDA"
    )
    return (
        wanted,
        f"{model.repo_id} is to be loaded on {wanted}, but {there}: set `device` to what `edif-site check` lists.",
    )


def _entry(model: ModelConfig, cache: Path, device: str, misplaced: str) -> Entry:
    revision, weights, problem = model.revision or "", 0, ""
    aliases: tuple[str, ...] = ()
    dtype, quantization = str(model.dtype), str(model.quantization)
    try:
        found = resolve_model(model.repo_id, model.revision, model.path, cache)
        revision, aliases = found.revision, found.aliases
        dtype = held_dtype(found.path, model.dtype, model.quantization) or "float32"
        quantization = model.quantization or checkpoint_quantization(found.path)
        weights = estimate_weights_bytes(found.path, model.dtype, model.quantization)
        problem = _problem(model, found.path, weights)
    except (EdifError, OSError, ValueError, KeyError, struct.error) as error:
        problem = str(error)
    problem = problem or misplaced
    on_gpu = device != "cpu"
    device_map = model.device_map if on_gpu else None
    offer = ModelOffer(
        repo_id=model.repo_id,
        revision=revision,
        task=model.task,
        dtype=dtype,
        state=ModelState.FAILED if problem else ModelState.LOADABLE,
        weights_bytes=weights,
        load_ms=5_000 + weights * 1000 // _BYTES_A_SECOND,
        attn_implementation=model.attn_implementation,
        detail=problem,
        aliases=aliases,
        quantization=quantization,
        memory_bytes=memory_bytes(weights) if weights else 0,
        pinned=model.pinned and not problem,
        device=device if device_map is None else device_map if isinstance(device_map, str) else _devices(device_map),
    )
    spec = ModelSpec(
        repo_id=model.repo_id,
        revision=revision if model.path is None else None,
        resolved_revision=revision,
        path=str(model.path) if model.path is not None else None,
        task=model.task,
        dtype=model.dtype,
        quantization=model.quantization,
        attn_implementation=model.attn_implementation,
        weights_bytes=weights,
        device=device,
        device_map=device_map,
        sharing="cuda" if on_gpu else "",
    )
    return Entry(offer, spec, (model.preload or model.pinned) and not problem, problem)


def _devices(device_map: dict[str, int | str]) -> str:
    return ",".join(sorted({f"cuda:{name}" if isinstance(name, int) else name for name in device_map.values()}))


def _problem(model: ModelConfig, folder: Path, weights: int) -> str:
    """Why the model cannot be loaded with these settings on this machine; empty when nothing is known against it."""
    if not weights:
        return f"There are no weights in {folder}."
    stored = checkpoint_quantization(folder)
    if model.quantization and stored:
        return f"{model.repo_id} is stored as {stored} already; leave its quantization out."
    package = _PACKAGES.get(model.quantization or "-") or _PACKAGES.get(model.attn_implementation or "-")
    if package and find_spec(package[0]) is None:
        asked = model.quantization if model.quantization in _PACKAGES else model.attn_implementation
        return f"{model.repo_id}: {asked} needs a package that is not installed. Type: pip install {package[1]}"
    if model.quantization == "fp8" and not hardware.gpus():
        return f"{model.repo_id}: fp8 needs a GPU of compute capability 8.9 or better, and this machine has none."
    return ""
