"""A site: a partner's capacity, as it states it and as the coordinator sees it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SiteStatus(StrEnum):
    """Whether a site gets work: ACTIVE, CORDONED, DRAINING by its own word; SUSPECT and LOST by the coordinator's."""

    ACTIVE = "ACTIVE"
    CORDONED = "CORDONED"
    DRAINING = "DRAINING"
    SUSPECT = "SUSPECT"
    LOST = "LOST"


class SandboxProfile(StrEnum):
    """How a site confines strangers' code, from the weakest to the strongest; each holds what the one before it holds."""

    BASE = "base"
    """Landlock, seccomp, limits, no new privileges, no descriptors, no environment; needs neither root nor namespaces."""
    NAMESPACED = "namespaced"
    """In addition user, mount, network, pid and IPC namespaces."""
    STRICT = "strict"
    """In addition the site's own container runtime around the model host."""

    def holds(self, least: str) -> bool:
        """Return whether this profile is at least `least`; "" demands nothing, and a name unknown here is held by none."""
        order = list(SandboxProfile)
        return least == "" or (least in order and order.index(self) >= order.index(SandboxProfile(least)))


def confines(advertised: str, least: str) -> bool:
    """Return whether a site that advertises `advertised` ("" when it cannot confine) may run an order that demands `least`."""
    if advertised not in list(SandboxProfile):
        return advertised != "" and least == ""
    return SandboxProfile(advertised).holds(least)


class ModelState(StrEnum):
    """What a site can say of a model in its catalogue."""

    LOADED = "LOADED"
    LOADING = "LOADING"
    """Also while the memory that it needs is still being freed."""
    EVICTING = "EVICTING"
    """Being unloaded; its memory is not free yet."""
    LOADABLE = "LOADABLE"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which model, as exactly as the researcher asked: `repo_id` is its Hugging Face id (or the site's own name)."""

    repo_id: str
    revision: str | None = None
    """A commit, branch or tag; None means the site's pinned one."""
    task: str = "text-generation"
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class ModelOffer:
    """One model that a site offers."""

    repo_id: str
    revision: str
    """The resolved commit, or a digest of a local folder."""
    task: str
    dtype: str
    state: ModelState
    weights_bytes: int
    """Of its tensors: estimated from the checkpoint, measured once it was loaded here."""
    load_ms: int
    """The last measured load time, or an estimate before the first."""
    attn_implementation: str = ""
    detail: str = ""
    """Why FAILED, or how far LOADING is; LOADED: the alarm for which it was loaded anew."""
    aliases: tuple[str, ...] = ()
    """Branches or tags that resolve to `revision` here."""
    quantization: str = ""
    """How the weights are held where that is no dtype: `nf4`, `fp4`, `int8`, `fp8`, or what the checkpoint itself says."""
    memory_bytes: int = 0
    """What it takes of the site's `models_bytes`: the weights and the process that holds them; 0: the weights."""
    pinned: bool = False
    """It is never evicted."""
    evictable_at_ms: int = 0
    """It stays loaded at least until this instant of the site's clock."""
    used_at_ms: int = 0
    """When an attempt last used it; 0: not since the agent started."""
    device: str = ""
    """Where its weights lie, or will: `cpu`, `cuda:0`, `cuda:0,cuda:1`, `auto` over all GPUs."""

    @property
    def takes_bytes(self) -> int:
        """What it takes of the memory that the site gives to models."""
        return self.memory_bytes or self.weights_bytes


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the CPU when there is none."""

    kind: str
    """`cuda` or `cpu`."""
    name: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions that decide whether a payload can be opened: dotted numbers, empty when unknown."""

    python: str = ""
    nnsight: str = ""
    torch: str = ""
    transformers: str = ""
    edif: str = ""
