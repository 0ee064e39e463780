"""The ways to a site's results, chosen by measured speed; what goes wrong on the direct one is taken over by the broker."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from edif_mesh.domain.ids import SiteId
from edif_mesh.errors import ResultError, TransportError
from edif_mesh.results import path_choice
from edif_mesh.results.direct_source import DirectSource
from edif_mesh.results.path_choice import Known, Path, Step
from edif_mesh.results.sources import Address, Batch, BrokerSource, Source, Way
from edif_mesh.transport.ports import Bulk
from edif_mesh.wire.messages import FetchResult, Manifest

log = logging.getLogger(__name__)

_PATIENCE_MS = 10_000


class Paths:
    """What one researcher's process knows of the ways to each site; for one event loop."""

    def __init__(self, bulk: Bulk, sign: Callable[[FetchResult], str], *, direct: bool = True) -> None:
        """`sign` returns the envelope of a request; without `direct` everything comes by the broker."""
        self._bulk, self._sign, self._direct = bulk, sign, direct
        self._known: dict[SiteId, Known] = {}

    def sources(self, manifest: Manifest) -> list[Way]:
        """Return the ways to try before the broker alone; none where the site offers none, or the result is small."""
        if not self._direct or not manifest.direct or manifest.stored_bytes < path_choice.WORTH_BYTES:
            return []
        return [FasterWay(self, manifest)]

    def broker(self) -> Source:
        """Return the broker's way."""
        return BrokerSource(self._bulk, _PATIENCE_MS)

    def direct(self, manifest: Manifest) -> Source:
        """Return the site's own way."""

        def envelope() -> str:
            return self._sign(
                FetchResult(manifest.site, manifest.job, manifest.attempt, issued_at_ms=time.time_ns() // 1_000_000)
            )

        return DirectSource(manifest.direct[0], envelope)

    def known(self, site: SiteId) -> Known:
        """Return what was learnt of a site."""
        return self._known.get(site, Known())

    def learn(self, site: SiteId, path: Path, size: int, seconds: float) -> None:
        """Note a measured span."""
        self._known[site] = path_choice.learnt(self.known(site), path, size / max(seconds, 1e-6), _now_ms())
        log.debug("a span came by %s", path, extra={"site": site, "bytes": size, "seconds": seconds})

    def bar(self, site: SiteId, for_ms: int, reason: str) -> None:
        """Do not try the direct way for a while."""
        self._known[site] = path_choice.barred(self.known(site), for_ms, _now_ms())
        text = "a site's own endpoint is left aside for %d s: %s"
        log.log(logging.WARNING if for_ms == path_choice.LYING_MS else logging.INFO, text, for_ms // 1000, reason)


class FasterWay:
    """The chunks of one attempt by whichever way is faster, changing over as often as that changes."""

    def __init__(self, paths: Paths, manifest: Manifest) -> None:
        self._paths, self._manifest = paths, manifest
        self._last = Path.BROKER

    def refused(self, reason: str) -> None:
        """See `Way`."""
        if self._last is Path.DIRECT:
            self._paths.bar(self._manifest.site, path_choice.LYING_MS, reason)

    async def chunks(self, address: Address, wanted: Mapping[int, int]) -> AsyncGenerator[Batch, None]:
        """See `Source`. Each way makes good what the other fails to give; raises what the broker's raises."""
        left, came = dict(sorted(wanted.items())), set[int]()
        site = self._manifest.site
        while left:
            step = path_choice.next_step(self._paths.known(site), sum(left.values()), _now_ms())
            self._last = step.path
            try:
                async with aclosing(self._step(address, _first(left, step, came), step.path)) as batches:
                    async for batch in batches:
                        for number, _ in batch:
                            left.pop(number, None)
                            came.add(number)
                        yield batch
            except (OSError, ResultError, TransportError) as error:
                if step.path is Path.BROKER:
                    if (
                        _now_ms() < self._paths.known(site).barred_until_ms
                        or sum(left.values()) < path_choice.WORTH_BYTES
                    ):
                        raise
                    self._paths.learn(site, Path.BROKER, 0, 1)
                    continue
                reached = self._paths.known(site).direct is not None or not isinstance(error, OSError)
                self._paths.bar(site, path_choice.BROKEN_MS if reached else path_choice.UNREACHABLE_MS, str(error))

    async def _step(self, address: Address, part: Mapping[int, int], path: Path) -> AsyncGenerator[Batch, None]:
        """Take a step, measuring it; ends early when the other way has become the better one."""
        paths, site = self._paths, self._manifest.site
        source = paths.direct(self._manifest) if path is Path.DIRECT else paths.broker()
        began, size = time.monotonic(), 0
        async with aclosing(source.chunks(address, part)) as batches:
            async for batch in batches:
                size += sum(len(data) for _, data in batch)
                yield batch
                if size >= path_choice.WINDOW_BYTES:
                    paths.learn(site, path, size, time.monotonic() - began)
                    began, size = time.monotonic(), 0
                    if path_choice.should_leave(paths.known(site), path):
                        return
        if size >= path_choice.WORTH_BYTES // 2:
            paths.learn(site, path, size, time.monotonic() - began)


def _first(left: Mapping[int, int], step: Step, came: set[int]) -> dict[int, int]:
    """Return the chunks of a step, at least one. The broker pushes without gaps: there it ends before what is here."""
    found: dict[int, int] = {}
    size, before = 0, min(left)
    for number, stored in left.items():
        gap = step.path is Path.BROKER and any(between in came for between in range(before + 1, number))
        if found and (gap or size + stored > step.at_most_bytes):
            break
        found[number] = stored
        size, before = size + stored, number
    return found


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
