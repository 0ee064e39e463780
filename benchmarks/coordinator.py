"""Coordinator latencies over loopback: order published to grant received, report to answer, and orders a second.

Usage: python -m benchmarks.coordinator [--rounds N]
Starts a real nats-server and a real coordinator process in a temporary folder; prints medians and 99th percentiles.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import httpx

from edif_mesh.domain.attempt import AttemptStatus, Receipt
from edif_mesh.domain.ids import Digest
from edif_mesh.wire import subjects
from edif_mesh.wire.envelope import seal
from edif_mesh.wire.messages import Grant, Manifest
from tests.integration.coordinator_rig import Researcher, Rig, Site, eventually, now_ms


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the coordinator.")
    parser.add_argument("--rounds", type=int, default=200)
    rounds: int = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="edif-bench-") as folder:
        asyncio.run(measure(Path(folder), rounds))


async def measure(folder: Path, rounds: int) -> None:
    rig = Rig(folder / "rig", sites=("ansbach",))
    rig.nats.start()
    try:
        await rig.start()
        connection = await rig.connect("bench")
        site, ada = Site(rig, connection, "ansbach"), Researcher(rig, connection)
        await site.open()
        await site.advertise(slots=1_000, memory_bytes=1 << 50, free_memory_bytes=1 << 50)
        orders, grants, reports = [], [], []
        for _ in range(rounds):
            stored, granted, reported = await one(site, ada)
            orders.append(stored)
            grants.append(granted)
            reports.append(reported)
        show("order published and stored by the broker", orders)
        show("order published -> grant at the site", grants)
        show("result reported -> committed and answered", reports)
        await flood(site, ada, rounds)
        await inside(rig)
        await connection.close()
    finally:
        await rig.close()


async def one(site: Site, ada: Researcher) -> tuple[float, float, float]:
    envelope = seal(ada.order(), ada.key).encode()
    site.placement = asyncio.Queue()
    began = time.perf_counter()
    publishing = asyncio.create_task(
        ada.connection.streams.append(subjects.order(ada.key.id), envelope, message_id=str(time.time_ns()))
    )
    publishing.add_done_callback(lambda _: stored.append(time.perf_counter() - began))
    stored: list[float] = []
    await site.placement.get()
    granted = time.perf_counter() - began
    await publishing
    await asyncio.sleep(0)
    grant = site.placed[-1][0]
    report = site.a_report(grant, AttemptStatus.SUCCEEDED, manifest=a_manifest(site, grant), receipt=Receipt(wall_ms=5))
    site.held.pop(grant.job, None)
    raw = seal(report, site.key).encode()
    began = time.perf_counter()
    await site.connection.bus.request(subjects.report(site.name), raw, timeout_ms=5_000)
    return stored[0], granted, time.perf_counter() - began


async def flood(site: Site, ada: Researcher, count: int) -> None:
    """Orders a second when they come all at once."""
    envelopes = [seal(ada.order(), ada.key).encode() for _ in range(count)]
    before, began = len(site.placed), time.perf_counter()
    await asyncio.gather(
        *(
            ada.connection.streams.append(subjects.order(ada.key.id), envelope, message_id=f"{began}-{number}")
            for number, envelope in enumerate(envelopes)
        )
    )
    await eventually(lambda: len({g.job for g, _ in site.placed[before:]}) >= count, "all granted", 60)
    print(f"{'orders placed a second, all at once':<45} {count / (time.perf_counter() - began):8.0f}")


async def inside(rig: Rig) -> None:
    """What the coordinator itself measured, as means."""
    async with httpx.AsyncClient() as http:
        lines = (await http.get(f"{rig.url}/metrics")).text.splitlines()
    values = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
    for name in ("edif_decision_seconds", "edif_commit_seconds"):
        mean = values[f"{name}_sum"] / max(1.0, values[f"{name}_count"])
        print(f"{name:<45} mean {mean * 1e3:5.2f} ms of {values[f'{name}_count']:.0f}")


def a_manifest(site: Site, grant: Grant) -> str:
    manifest = Manifest(
        order_digest=grant.order_digest,
        job=grant.job,
        attempt=grant.attempt,
        site=site.name,
        archive_bytes=10,
        stored_bytes=10,
        chunks=1,
        root=Digest("1" * 64),
        issued_at_ms=now_ms(),
        receipt=Receipt(wall_ms=5),
    )
    return seal(manifest, site.key)


def show(what: str, seconds: list[float]) -> None:
    ordered = sorted(seconds)
    p99 = ordered[int(len(ordered) * 0.99) - 1]
    print(f"{what:<45} p50 {statistics.median(ordered) * 1e3:6.2f} ms   p99 {p99 * 1e3:6.2f} ms")


if __name__ == "__main__":
    main()
