"""`make sim SEED=7`: replay one seed, or run many: python -m tests.simulation.run --seeds 1-100 --steps 20000."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulation.world import Violation, run


def main() -> None:
    """Run, print what happened, and exit 1 on a violation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="1", help="one seed, or a range such as 1-100")
    parser.add_argument("--steps", type=int, default=20_000, help="decisions with faults in each seed")
    given = parser.parse_args()
    first, _, last = given.seeds.partition("-")
    counts: Counter[str] = Counter()
    began, steps = time.perf_counter(), 0
    for seed in range(int(first), int(last or first) + 1):
        try:
            world = run(seed, given.steps)
        except Violation as violation:
            sys.exit(f"VIOLATION {violation}")
        counts += world.counts
        steps += world.steps
        counts["succeeded"] += len(world.committed)
        counts["orders"] += len(world.orders)
    took = time.perf_counter() - began
    print(f"{steps} steps in {took:.1f} s ({steps / took:.0f}/s), seeds {given.seeds}: no violation")
    for name, count in counts.most_common():
        print(f"  {name}: {count}")


if __name__ == "__main__":
    main()
