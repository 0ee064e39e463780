"""Settings of the daemons and of the client: TOML files, strict keys, every error names the file and the key.

`configs/` holds one commented file for each of the three with every key, its default and its unit.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from edif_mesh.domain.ids import FederationId, SiteId, is_name
from edif_mesh.domain.job import Limits
from edif_mesh.errors import ConfigError

C = TypeVar("C", "CoordinatorConfig", "SiteConfig", "ClientConfig")
_STRICT = ConfigDict(extra="forbid")
_DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """How to reach NATS."""

    __pydantic_config__ = _STRICT

    url: str = "nats://127.0.0.1:4222"
    user: str | None = None
    password_file: Path | None = None
    """Holds the password as its only line; mode 600."""


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """How much the broker may keep, in bytes, of each stream; a full stream refuses and never drops."""

    __pydantic_config__ = _STRICT

    orders_bytes: int = 256 << 20
    payloads_bytes: int = 2 << 30
    results_bytes: int = 16 << 30
    logs_bytes: int = 256 << 20
    keep_results_days: float = 7.0
    """How long a result can be fetched, and its printed lines read."""
    most_bytes_of_one_researcher: int = 200 << 30
    """Of kept results; who has more orders nothing new before something is deleted."""
    most_bytes_of_one_site: int = 1 << 40
    """Of kept results that one site has made; beyond it nothing more is placed there."""


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The coordinator's times, all in milliseconds; the defaults fit a wide-area federation."""

    __pydantic_config__ = _STRICT

    lease_ms: int = 30_000
    suspect_ms: int = 15_000
    disconnect_grace_ms: int = 2_000
    grant_repeat_ms: int = 1_000
    tick_ms: int = 250


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """Settings of `edif-coordinator`."""

    __pydantic_config__ = _STRICT

    federation: FederationId
    key_file: Path
    trust_file: Path
    database_url: str
    """`sqlite:///FILE`, or `postgresql://...` (not yet tested)."""
    broker: BrokerConfig = BrokerConfig()
    store: StoreConfig = StoreConfig()
    policy: PolicyConfig = PolicyConfig()
    system_user: str | None = None
    """A user of the broker's system account: the broker then says at once when a site's connection is gone."""
    system_password_file: Path | None = None
    http_host: str = "127.0.0.1"
    http_port: int = 8002
    log_level: str = "INFO"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model of a site's catalogue: by hub id (with the site's Hugging Face cache) or by local path."""

    __pydantic_config__ = _STRICT

    repo_id: str
    revision: str | None = None
    path: Path | None = None
    """A local folder with config.json and weights; `repo_id` is then only the name it is offered under."""
    task: str = "text-generation"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """With a `quantization`: what the model computes in."""
    quantization: Literal["", "nf4", "fp4", "int8", "fp8"] = ""
    """How the weights are held, by nnsight's names; empty: as they are stored, in `dtype`."""
    attn_implementation: Literal["", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = ""
    """Empty: what transformers chooses for the model. A request may ask for another one and gets it for itself."""
    preload: bool = True
    """Loaded at start as far as there is room; later it may be evicted."""
    pinned: bool = False
    """Loaded at start and never evicted; its memory is kept for it."""
    device: _DeviceName | None = None
    """Where this model goes; None: the site's `device`."""
    device_map: str | dict[str, int | str] | None = None
    """Over several GPUs, as transformers takes it: `auto`, `balanced`, or a table of modules and devices."""


@dataclass(frozen=True, slots=True)
class DirectConfig:
    """Where a site itself serves finished results over HTTPS, and how much of them it keeps."""

    __pydantic_config__ = _STRICT

    url: Annotated[str, Field(pattern=r"^https://[^/@?#\s]+:\d{1,5}$")]
    """`https://host:port` as researchers reach it; what stands in front must not end TLS."""
    host: str = "0.0.0.0"
    port: Annotated[int, Field(ge=1, le=65535)] = 8443
    keep_bytes: Annotated[int, Field(ge=0)] = 64 << 30
    """On the site's disk, under `state_dir`; the oldest results go first."""
    keep_hours: Annotated[int, Field(ge=1)] = 72


@dataclass(frozen=True, slots=True)
class SiteConfig:
    """Settings of `edif-site`."""

    __pydantic_config__ = _STRICT

    federation: FederationId
    site: SiteId
    key_file: Path
    trust_file: Path
    state_dir: Path
    models: tuple[ModelConfig, ...]
    broker: BrokerConfig = BrokerConfig()
    country: str = ""
    """ISO 3166 two-letter code; orders may restrict where they run."""
    slots: int = 2
    """Attempts at once over all models."""
    ready_children: int = 2
    """Warm children kept waiting for each loaded model."""
    threads: int = 1
    """CPU threads of one runner; keep slots x threads within the cores."""
    memory_bytes: int = 0
    """For runners, beyond the models; 0 means 80 % of what is free at start, less `models_bytes`."""
    models_bytes: int = 0
    """For loaded models together: their weights, and 0.47 GB for the process of each. 0 means what all of them need and a quarter
    more; at most half of 80 % of what is free at start, or what the largest needs, or what `memory_bytes` leaves free. At a site whose
    models lie on GPUs it speaks of the GPUs' memory together, of which 0 gives 80 % of what is free at most."""
    min_residency_s: int = 600
    """A model that was loaded stays for so long before another one may take its place."""
    hf_cache: Path | None = None
    """The Hugging Face cache; None means where HF_HUB_CACHE or HF_HOME point."""
    limits: Limits = field(
        default_factory=lambda: Limits(
            wall_ms=3_600_000, memory_bytes=64 << 30, result_bytes=64 << 30, log_bytes=16 << 20
        )
    )
    """The most that an order may ask for here."""
    advert_ms: int = 5_000
    log_level: str = "INFO"
    device: _DeviceName = "auto"
    """Where models go: `cpu`, `cuda` (the first GPU), `cuda:1`; `auto`: the first GPU where there is one, else the CPU."""
    sandbox: Literal["auto", "base", "namespaced", "strict"] = "auto"
    """The profile that runners get; `auto`: the strongest that passes its self-test on this machine."""
    least_sandbox: Literal["base", "namespaced", "strict"] = "base"
    """This site runs nothing rather than under a weaker profile."""
    direct: DirectConfig | None = None
    """None: results leave by the broker only."""
    sandbox_command: tuple[str | tuple[str, ...], ...] = ()
    """For `strict`: the runtime in which model hosts start, a command that ends where theirs begins. A part with
    `{readable}` (a text, or a list of texts) is repeated for every folder that a host must be able to read."""


@dataclass(frozen=True, slots=True)
class ResultsConfig:
    """How results of ours travel when nothing else is said."""

    __pydantic_config__ = _STRICT

    compression: Literal["auto", "off", "fast", "best"] = "auto"
    """Lossless; `auto` weighs what it saves against the measured links."""
    wire_dtype: Literal["", "float16", "bfloat16", "int8"] = ""
    """Floating tensors travel in this dtype and come back in their own, rounded; empty: exact."""
    sealed: bool = False
    """Only we can open our results; broker and coordinator see ciphertext."""
    direct: bool = True
    """Large ones come straight from the site where it offers that and it is faster."""


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Settings of the researcher's side: CLI, Python client and personal gateway."""

    __pydantic_config__ = _STRICT

    federation: FederationId
    key_file: Path
    trust_file: Path
    outbox_dir: Path
    """Orders and payloads wait here until the coordinator has recorded them."""
    broker: BrokerConfig = BrokerConfig()
    gateway_host: str = "127.0.0.1"
    gateway_port: int = 8001
    monitor_url: str = ""
    """The coordinator's web page, shown by `edif status`."""
    sandbox: Literal["", "base", "namespaced", "strict"] = ""
    """The least sandbox profile that every order of ours demands; empty: the site's own choice."""
    limits: Limits = Limits()
    """What an order asks for when nothing else is said: by `edif run`, the gateway and the Python client."""
    results: ResultsConfig = ResultsConfig()


def home() -> Path:
    """Return where a local mesh keeps its state: `$EDIF_HOME`, else `~/.edif`."""
    return Path(os.environ.get("EDIF_HOME") or Path.home() / ".edif")


def load_config(cls: type[C], path: Path) -> C:
    """Read the TOML file at `path` as a `cls`; relative paths in it are taken from its own folder.

    Raises ConfigError, with the file and the key to change.
    """
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        hint = " Start a local mesh with `edif up`, or set EDIF_HOME to the folder that holds yours."
        raise ConfigError(f"There is no settings file {path}.{hint if cls is ClientConfig else ''}") from error
    except OSError as error:
        raise ConfigError(f"The settings file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {path} is not TOML: {error}") from error
    try:
        config = TypeAdapter(cls).validate_python(_absolute(data, path.parent))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"In {path}: {where}: {first['msg']}.") from error
    if unknown := sorted(set(data.get("limits", ())) - set(Limits.__dataclass_fields__)):
        raise ConfigError(f"In {path}: limits.{unknown[0]}: there is no such limit.")
    for name in (config.federation, getattr(config, "site", "x")):
        if not is_name(name):
            raise ConfigError(f"In {path}: {name!r} is no name: use lower-case letters, digits and dashes.")
    return config


def read_password(config: BrokerConfig) -> str | None:
    """Return the broker's password, or None when there is none; raises ConfigError that names the file."""
    if config.password_file is None:
        return None
    try:
        return config.password_file.read_text().strip()
    except OSError as error:
        raise ConfigError(f"The password file {config.password_file} cannot be read: {error.strerror}.") from error


def _absolute(value: object, folder: Path, key: str = "") -> object:
    if isinstance(value, dict):
        return {name: _absolute(child, folder, name) for name, child in value.items()}
    if isinstance(value, list):
        return [_absolute(child, folder, key) for child in value]
    if isinstance(value, str) and (key.endswith(("_file", "_dir")) or key in {"path", "hf_cache"}):
        return str(folder / Path(value).expanduser())
    return value
