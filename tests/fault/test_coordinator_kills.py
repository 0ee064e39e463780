"""The coordinator is killed again and again under load: no acknowledged order is lost, none commits twice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.errors import EdifError
from edif_mesh.wire.messages import Grant
from tests.integration.coordinator_rig import Researcher, Rig, Site, eventually
from tests.integration.test_coordinator_process import a_manifest

KILLS = 6
ORDERS = 60
SEED = 20_260


@pytest.mark.timeout(150)
async def test_kill_9_under_load_loses_nothing_and_commits_once(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    rig = Rig(tmp_path / "rig")
    rig.nats.start()
    tasks: list[asyncio.Task[None]] = []
    try:
        await rig.start()
        connection = await rig.connect("test")
        sites = [Site(rig, connection, name) for name in rig.site_keys]
        for site in sites:
            await site.open()
            tasks += [asyncio.create_task(site.keep_advertising()), asyncio.create_task(work(site))]
        ada = Researcher(rig, connection)
        orders = [asyncio.create_task(submit(ada, chance.uniform(0, 10))) for _ in range(ORDERS)]
        epochs = []
        for _ in range(KILLS):
            await asyncio.sleep(chance.uniform(0.2, 1.2))
            await rig.stop(signal.SIGKILL)
            epochs.append((await rig.start())["epoch"])
        jobs = await asyncio.gather(*orders)
        await eventually(lambda: ended(rig) == ORDERS, "every job ended", 60)
        for task in tasks:
            task.cancel()
        await connection.close()
        assert epochs == list(range(2, KILLS + 2))
        check_record(rig.database, set(jobs))
    finally:
        for task in tasks:
            task.cancel()
        await rig.close()


async def submit(ada: Researcher, after_s: float) -> str:
    await asyncio.sleep(after_s)
    return (await ada.submit()).job


async def work(site: Site) -> None:
    """Run every grant once, as a site does that remembers what it ran; repeat each report until it is answered."""
    seen: set[tuple[str, int]] = set()
    running: set[asyncio.Task[None]] = set()
    while True:
        grant = await site.placement.get()
        if (grant.job, grant.attempt) not in seen:
            seen.add((grant.job, grant.attempt))
            running.add(asyncio.create_task(run(site, grant)))


async def run(site: Site, grant: Grant) -> None:
    await asyncio.sleep(0.3)
    manifest = a_manifest(site, grant)
    while True:
        with contextlib.suppress(EdifError):
            await site.report(grant, AttemptStatus.SUCCEEDED, manifest=manifest)
            return
        await asyncio.sleep(0.2)


def ended(rig: Rig) -> int:
    with contextlib.closing(sqlite3.connect(rig.database, timeout=10)) as database:
        return int(database.execute("SELECT count(*) FROM edif_job WHERE terminal").fetchone()[0])


def check_record(path: Path, jobs: set[str]) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        statuses = dict(database.execute("SELECT job, status FROM edif_job"))
        commits = Counter(job for (job,) in database.execute("SELECT job FROM edif_audit WHERE what = 'job succeeded'"))
        queued = Counter(job for (job,) in database.execute("SELECT job FROM edif_audit WHERE what = 'job queued'"))
        numbers = database.execute("SELECT job, count(*), max(attempt), min(attempt) FROM edif_attempt GROUP BY job")
        attempts = numbers.fetchall()
    assert set(statuses) == jobs
    assert set(statuses.values()) == {"SUCCEEDED"}
    assert all(commits[job] == 1 for job in jobs)
    assert all(queued[job] >= 1 for job in jobs)
    assert all(first == 1 and last == count for _, count, last, first in attempts)
