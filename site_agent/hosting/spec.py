"""What a host is asked to load, and what it says of the loaded model."""

from __future__ import annotations

from dataclasses import dataclass

LOADING_WEIGHTS = "loading weights"
"""What a host says it does from the moment on at which the memory that it takes is weights."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model: by hub id from the site's Hugging Face cache, or from the local folder `path`."""

    repo_id: str
    revision: str | None = None
    resolved_revision: str = ""
    path: str | None = None
    task: str = "text-generation"
    dtype: str = "auto"
    quantization: str = ""
    attn_implementation: str = ""
    weights_bytes: int = 0
    """As estimated, to tell how far the loading is; 0: unknown."""
    device: str = "cpu"
    """`cpu`, `cuda` (the first), `cuda:1`."""
    device_map: str | dict[str, int | str] | None = None
    """Over several devices, as transformers takes it: `auto`, `balanced`, or where each module goes. Then `device` is not used."""
    sharing: str = ""
    """How runners get the weights: empty, by fork; else a kind of `stores`."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a host has loaded."""

    repo_id: str
    revision: str
    task: str
    dtype: str
    weights_bytes: int
    load_ms: int
    attn_implementation: str
    nnsight: str
    pid: int
    """As the agent counts processes."""
    sandbox: str = ""
    """The profile that the host has put around its runners."""
    device: str = "cpu"
    """Where the weights lie: `cpu`, `cuda:0`, `cuda:0,cuda:1`."""
    sharing: str = ""
    """How runners get the weights, as chosen: see `ModelSpec`."""
