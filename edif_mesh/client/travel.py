"""How results travel, as a person writes it: `--result compression=best --result wire_dtype=float16 --result sealed`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from edif_mesh.config import ResultsConfig
from edif_mesh.errors import ConfigError
from edif_mesh.wire.messages import COMPRESSIONS, WIRE_DTYPES

_YES_NO = {"sealed": True, "sealed=true": True, "sealed=false": False}
_WORDS = {"compression": COMPRESSIONS, "wire_dtype": WIRE_DTYPES}


def with_results(results: ResultsConfig, given: Iterable[str]) -> ResultsConfig:
    """Return `results` with each setting of `given` in place; raises ConfigError with what may be written."""
    for text in given:
        name, _, value = text.partition("=")
        if text in _YES_NO:
            results = replace(results, sealed=_YES_NO[text])
        elif name in _WORDS and value in _WORDS[name]:
            setting: dict[str, Any] = {name: value}
            results = replace(results, **setting)
        elif name in _WORDS:
            raise ConfigError(f"{text!r}: write {name}= and one of {', '.join(filter(None, _WORDS[name]))}.")
        else:
            raise ConfigError(
                f"There is no setting {text!r} of results. Write compression=..., wire_dtype=... or sealed."
            )
    return results
