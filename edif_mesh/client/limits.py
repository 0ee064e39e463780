"""Limits as a person writes them: `--limit memory=16GB --limit wall=2h`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from edif_mesh.domain.job import Limits
from edif_mesh.errors import ConfigError

_FIELDS = {"wall": "wall_ms", "cpu": "cpu_ms", "memory": "memory_bytes", "result": "result_bytes", "log": "log_bytes"}
_TIMES = {"ms": 1, "s": 1_000, "min": 60_000, "h": 3_600_000}
_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def with_limits(limits: Limits, given: Iterable[str]) -> Limits:
    """Return `limits` with each `NAME=VALUE` of `given` in place; raises ConfigError with what may be written."""
    for text in given:
        name, _, value = text.partition("=")
        if name not in _FIELDS:
            raise ConfigError(f"There is no limit {name!r}. Write {', '.join(f'{n}=...' for n in _FIELDS)}.")
        units = _TIMES if name in ("wall", "cpu") else _SIZES
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", value)
        if found is None or found[2] not in units:
            raise ConfigError(
                f"{text!r}: write a number and a unit ({', '.join(units)}), for example {name}={_example(name)}."
            )
        limits = replace(limits, **{_FIELDS[name]: int(float(found[1]) * units[found[2]])})
    return limits


def _example(name: str) -> str:
    return "90min" if name in ("wall", "cpu") else "16GB"
