"""How the process of a model host is started: its settings, its command, its environment, and which folders it may read."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from edif_mesh.domain.site import SandboxProfile
from site_agent.hosting.spec import ModelSpec
from site_agent.runner.confine import interpreter_folders
from site_agent.runner.process import clean_environment, host_command, host_folders

_CUDA = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # `cuda:1` means what the driver's own tools call 1
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # the fork server may be asked whether there is CUDA, and must not start it
    # Weights that moved into segments are given back page by page, not when all of a large block is free.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "CUDA_CACHE_DISABLE": "1",  # runners write no file
    "CUDA_MPS_PIPE_DIRECTORY": "/nonexistent",  # never MPS: a fault of one of its clients ends all of them
}


@dataclass(frozen=True, slots=True)
class HostSettings:
    """How a host is run."""

    ready_children: int = 2
    hf_cache: Path | None = None
    offline: bool = True
    load_timeout_s: float = 1800.0
    log_file: Path | None = None
    sandbox: SandboxProfile = SandboxProfile.BASE
    """What its runners get; one that passed its self-test (`selftest.choose`)."""
    sandbox_command: tuple[str | tuple[str, ...], ...] = ()
    """For STRICT: see `SiteConfig.sandbox_command`."""


def readable_folders(spec: ModelSpec, hf_cache: Path | None) -> list[str]:
    """What a runner may read of the site's models: its own model's files and the adapters, no other model's weights."""
    folders = [Path(spec.path)] if spec.path else []
    if hf_cache is not None:
        folders.append(hf_cache / f"models--{spec.repo_id.replace('/', '--')}")
        folders += {path.parents[2] for path in hf_cache.glob("models--*/snapshots/*/adapter_config.json")}
    return [str(folder) for folder in folders]


def command(settings: HostSettings, descriptor: int, readable: list[str], spec: ModelSpec) -> list[str]:
    """Return the command of a host that speaks on `descriptor`: in the site's own runtime where the profile is STRICT."""
    runtime = settings.sandbox_command if settings.sandbox is SandboxProfile.STRICT else ()
    folders = host_folders((*interpreter_folders(), *readable))
    kind = "zygote" if spec.sharing else "host"
    return host_command("site_agent.hosting.launch", (str(descriptor), kind, settings.sandbox), runtime, folders)


def environment(settings: HostSettings, spec: ModelSpec) -> dict[str, str]:
    """Return a host's environment. It gets no secret: what it holds, every child holds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not spec.sharing.startswith("cuda"):
        devices = {"CUDA_VISIBLE_DEVICES": ""}  # a host that forks must never start CUDA, whatever a library asks of it
    else:
        devices = {**_CUDA, **({"CUDA_VISIBLE_DEVICES": visible} if visible is not None else {})}
    cache = {"HF_HUB_CACHE": str(settings.hf_cache)} if settings.hf_cache else {}
    return {
        **clean_environment(),
        **({"HOME": "/"} if settings.sandbox is SandboxProfile.STRICT or _is_unlisted() else {}),
        **cache,
        **devices,
        "HF_HUB_OFFLINE": "1" if settings.offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages for weights: see `pages`
    }


def _is_unlisted() -> bool:
    """Whether the agent's user is in no list of users: its home, which libraries ask for, is then unknown."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return True
    return False
