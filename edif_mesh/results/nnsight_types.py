"""What `tracer.cache()` gave, with or without nnsight in this process.

Importing nnsight mounts a `.save` on every object and patches torch, which breaks a web server's uploads; so reading a
result never imports it. Where nnsight is loaded already its own `CacheView` is built; elsewhere a stand-in that is read
the same way by path, and that `torchfile` writes as the real class.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

CACHE_MODULE = "nnsight.intervention.cache"
ENVOY = "nnsight.intervention.envoy.Envoy"
SERVED = frozenset({"input", "inputs", "output", "source", "iter", "device", "devices", "parent", "root"})
"""Names that every envoy serves itself: a module of that name stands at `E_NAME`."""


@dataclass
class CachedVisit:
    """One visit to a module: its output, and its `(args, kwargs)` when they were asked for."""

    output: Any = None
    inputs: Any = None

    @property
    def input(self) -> Any:
        """The first input: positional, else by keyword."""
        args, kwargs = self.inputs or ((), {})
        return next(iter([*args, *kwargs.values()]), None)


@dataclass
class ActivationCache:
    """Stand-in for nnsight's `CacheView`: `cache["model.transformer.h.0"].output`, `.inputs`, `keys()`, `len()`."""

    entries: dict[str, list[CachedVisit]]
    path: str | None = None

    def keys(self) -> list[str]:
        """The cached module paths."""
        return [key for key in self.entries if self.path is None or key == self.path]

    def __getitem__(self, path: str) -> ActivationCache:
        if path not in self.entries:
            raise KeyError(f"{path!r} was not cached")
        return ActivationCache(self.entries, path)

    def __contains__(self, path: object) -> bool:
        return path in self.entries

    def __len__(self) -> int:
        return len(self._visits())

    def _visits(self) -> list[CachedVisit]:
        if self.path is None:
            raise KeyError("the cache root is not a module")
        return self.entries[self.path]

    def _values(self, name: str) -> Any:
        values = [getattr(visit, name) for visit in self._visits()]
        return values[0] if len(values) == 1 else values

    @property
    def output(self) -> Any:
        """The module's output, or a list of them when it was visited more than once."""
        return self._values("output")

    @property
    def inputs(self) -> Any:
        """The module's `(args, kwargs)`, or a list of them."""
        return self._values("inputs")

    @property
    def input(self) -> Any:
        """The module's first input, or a list of them."""
        return self._values("input")


def activation_cache(entries: dict[str, list[tuple[Any, Any]]], path: str | None = None) -> Any:
    """Return what `tracer.cache()` gives over `{module path: [(output, inputs), ...]}`; with `path`, that module's view of it."""
    module = sys.modules.get(CACHE_MODULE)
    if module is None:
        return ActivationCache({at: [CachedVisit(*visit) for visit in found] for at, found in entries.items()}, path)
    visits = {at: [module.Entry(output=o, inputs=i) for o, i in found] for at, found in entries.items()}
    cache = module.Cache.__new__(module.Cache)
    cache.__dict__.update(cache_state(visits))
    return module.CacheView(cache, None, path)


def cache_state(visits: dict[str, list[Any]]) -> dict[str, Any]:
    """The attributes of nnsight's `Cache` after it was pickled: no model, only what was recorded."""
    inputs = any(visit.inputs is not None for found in visits.values() for visit in found)
    return {
        "model": None,
        "device": None,
        "dtype": None,
        "detach": True,
        "non_blocking": False,
        "include_output": True,
        "include_inputs": inputs,
        "targets": None,
        "entries": visits,
        "_open": {},
    }
