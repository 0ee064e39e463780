"""The files in configs/ load, name every key that there is, and state the true defaults."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edif_mesh.config import (
    ClientConfig,
    CoordinatorConfig,
    DirectConfig,
    ModelConfig,
    ResultsConfig,
    SiteConfig,
    load_config,
)
from edif_mesh.errors import ConfigError
from edif_mesh.transport.embedded import find_binary

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = [("coordinator.toml", CoordinatorConfig), ("site.toml", SiteConfig), ("client.toml", ClientConfig)]


@pytest.mark.parametrize(("name", "cls"), FILES)
def test_a_sample_loads_and_states_the_defaults(name: str, cls: Any) -> None:
    config = load_config(cls, CONFIGS / name)
    for field in dataclasses.fields(config):
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is not None and not isinstance(default, Path) and field.name != "country":
            assert getattr(config, field.name) == default, field.name


@pytest.mark.parametrize(("name", "cls"), FILES)
def test_a_sample_names_every_key(name: str, cls: Any) -> None:
    text = (CONFIGS / name).read_text()
    tables: dict[Any, list[Any]] = {SiteConfig: [ModelConfig, DirectConfig], ClientConfig: [ResultsConfig]}
    for part in (cls, *tables.get(cls, [])):
        for field in dataclasses.fields(part):
            assert re.search(rf"^\s*(# )?\[*{field.name}\b", text, re.MULTILINE), field.name


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text((CONFIGS / "client.toml").read_text().replace("gateway_port", "gateway_prot"))
    with pytest.raises(ConfigError, match="gateway_prot"):
        load_config(ClientConfig, file)


def test_an_unknown_limit_is_named(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text((CONFIGS / "client.toml").read_text().replace("wall_ms", "wal_ms"))
    with pytest.raises(ConfigError, match=r"limits\.wal_ms"):
        load_config(ClientConfig, file)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text("federation = 'x'")
    with pytest.raises(ConfigError, match="site: Field required"):
        load_config(SiteConfig, file)


def test_the_broker_accepts_the_sample(tmp_path: Path) -> None:
    text = (CONFIGS / "nats" / "hub.conf").read_text().replace("/var/lib/edif", str(tmp_path))
    (tmp_path / "hub.conf").write_text(text)
    done = subprocess.run(
        [find_binary(), "-c", tmp_path / "hub.conf", "-t"], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
