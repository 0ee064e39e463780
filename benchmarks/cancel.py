"""How long a cancel takes at a site: from the stop order to its last report, which leaves when the runner is gone.

Run from the repository: `python -m benchmarks.cancel [--runs 10]`. A real agent, host and broker on this machine; prints
median and highest in milliseconds for each thing that the job is doing when it is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from tests.hosted import code
from tests.integration.test_runner_limits import ALLOWED, PHASES, printed
from tests.played_coordinator import Site, a_site


async def stopped_ms(site: Site, source: str) -> float:
    """Run `source` until it prints, stop it, and return the milliseconds until the last report."""
    order = await site.coordinator.order(code(source), limits=ALLOWED)
    await site.coordinator.place(order)
    await printed(site, order)
    began = time.perf_counter()
    await site.coordinator.stop(order)
    await site.coordinator.ended(order)
    return (time.perf_counter() - began) * 1000


async def measure(runs: int) -> None:
    """Print one line a phase."""
    with tempfile.TemporaryDirectory(prefix="edif-cancel-") as folder:
        async with a_site(Path(folder)) as site:
            print(f"{'what the job was doing':32} {'median ms':>10} {'highest ms':>11}")
            for name, source in PHASES.items():
                taken = [await stopped_ms(site, source) for _ in range(runs)]
                print(f"{name:32} {statistics.median(taken):10.0f} {max(taken):11.0f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    asyncio.run(measure(parser.parse_args().runs))
