"""Rebuild nnsight's own data classes, without letting its import change this process.

Importing nnsight mounts a `.save` on every object and patches glibc's backtrace; with lazily importing web frameworks the
first breaks uploads. Where nnsight is not imported yet (the gateway), it is imported with both switched off.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from edif_mesh.errors import ArchiveError


def activation_cache(entries: dict[str, list[tuple[Any, Any]]]) -> Any:
    """Return what `tracer.cache()` gives: a `CacheView` over `{module path: [(output, inputs), ...]}`."""
    cache_module = _nnsight_cache()
    cache = cache_module.Cache.__new__(cache_module.Cache)
    visits = {
        path: [cache_module.Entry(output=output, inputs=inputs) for output, inputs in found]
        for path, found in entries.items()
    }
    cache.__dict__.update(
        model=None, device=None, dtype=None, detach=True, non_blocking=False, include_output=True,
        include_inputs=any(entry.inputs is not None for found in visits.values() for entry in found),
        targets=None, entries=visits, _open={},
    )  # fmt: skip
    return cache_module.CacheView(cache, None)


def _nnsight_cache() -> Any:
    if "nnsight" not in sys.modules:
        quiet = types.ModuleType("nnsight._c")
        quiet.mount = lambda *args: None  # type: ignore[attr-defined]
        quiet.install_backtrace_guard = lambda: None  # type: ignore[attr-defined]
        sys.modules["nnsight._c"] = quiet
    try:
        from nnsight.intervention import cache
    except ImportError as error:
        raise ArchiveError("This result holds a tracer.cache(); reading it needs nnsight installed here.") from error
    return cache
