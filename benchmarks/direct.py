"""How fast a finished result comes straight from a site: its real endpoint process, and a client to verified bytes.

Run from the repository: `python -m benchmarks.direct [--sizes 300 2000] [--runs 5] [--links 1 2]`. Prints medians in MB/s
(1 MB = 10^6 bytes) with raw loopback TCP in the same run. The clock runs from the first request to the last chunk that was
checked against its SHA-256 and placed in memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from benchmarks.transfer import loop_run, raw_tcp, show
from edif_mesh.domain.ids import JobId
from edif_mesh.results.direct_source import DirectSource
from edif_mesh.results.transfer import index_parts, sha256, store_chunk
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import BufferSink
from edif_mesh.transport.memory import MemoryBroker
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import seal
from edif_mesh.wire.messages import FetchResult, Manifest
from site_agent.direct.kept import KeptResult
from tests.direct_rig import ONE, DirectSite, now_ms


class Straight(DirectSource):
    """The direct way alone."""

    def refused(self, reason: str) -> None:
        raise SystemExit(f"The endpoint gave wrong bytes: {reason}")


def read_process(site: DirectSite, pipe: Pipe, links: int) -> None:
    loop_run(reading(site, pipe, links))


async def reading(site: DirectSite, pipe: Pipe, links: int) -> None:
    """Read each result that is named, and say how long it took; only the index comes from a broker, in memory."""
    broker = MemoryBroker()
    bulk = broker.bulk()
    await broker.durable().ensure(subjects.STREAMS, max_bytes={spec.name: 1 << 30 for spec in subjects.STREAMS})
    while (told := pipe.recv()) is not None:
        manifest, raw = told
        for name, part in index_parts(raw):
            subject = subjects.result_chunk(manifest.job, ONE, name)
            await store_chunk(bulk, subject, (part,), sha256((part,)))

        def envelope(manifest: Manifest = manifest) -> str:
            return seal(FetchResult(manifest.site, manifest.job, manifest.attempt, now_ms()), site.owner)

        source = Straight(site.endpoint, envelope, links)
        reader = ResultReader(bulk, manifest.job, BufferSink(), sources=lambda _, source=source: [source])
        began = time.monotonic()
        await reader.read(manifest)
        pipe.send(time.monotonic() - began)


def direct(sizes: list[int], runs: int, links: int) -> dict[int, list[float]]:
    """Return the seconds of each run, by size in MB."""
    here, there = multiprocessing.Pipe()
    took: dict[int, list[float]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory(prefix="edif-bench-") as folder:
        site = DirectSite(Path(folder))
        arguments: tuple[Any, ...] = (site, there, links)
        process = multiprocessing.get_context("fork").Process(target=read_process, args=arguments)
        process.start()
        site.start()
        try:
            for number, size in enumerate(sizes):
                job = JobId(f"j{number:023x}")
                manifest = site.keep(job, os.urandom(size * 1_000_000))
                raw = KeptResult.open(site.store.folder, job, ONE).index
                for _ in range(runs + 1):
                    here.send((manifest, raw))
                    took[size].append(here.recv())
                site.store.drop(job)
        finally:
            here.send(None)
            process.join(10)
            site.kill()
    return {size: seconds[1:] for size, seconds in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 300, 2000])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--links", type=int, nargs="+", default=[2], help="connections at once")
    options = parser.parse_args()
    show("raw loopback TCP", raw_tcp(options.sizes, options.runs))
    for links in options.links:
        show(f"direct, {links} links", direct(options.sizes, options.runs, links))


if __name__ == "__main__":
    main()
