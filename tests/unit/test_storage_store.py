"""The record: all of a transaction or nothing, only for the term that leads, never for a newer schema."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.shell.leadership import Leadership
from coordinator.storage.errors import LostLeadershipError, RecordFullError, StaleRecordError
from coordinator.storage.recording import AuditLine, Recording, StoredJob, StoredOrder, StoredSite
from coordinator.storage.store import Store
from edif_mesh.domain.ids import Digest, Epoch, JobId, KeyId, SiteId
from edif_mesh.errors import ConfigError


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/record.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


def a_job(number: int = 1, *, version: int = 1, status: str = "QUEUED", terminal: bool = False) -> StoredJob:
    job = JobId(f"j{number:023x}")
    return StoredJob(job, version, status, terminal, KeyId("k"), "gpt2", number, number + version, f'{{"v":{version}}}')


def test_what_was_recorded_is_read_back_by_the_next_process(url: str) -> None:
    first = Store(url)
    epoch = first.begin_term(1, "here")
    order = StoredOrder(a_job().job, Digest("d"), '{"payload": "exact \\u00e9 bytes"}')
    first.apply(Recording(epoch, (a_job(),), (), (order,), (StoredSite(SiteId("a"), "{}"),), (AuditLine(5, "x"),)))
    first.close()

    second = Store(url)
    assert list(second.open_jobs()) == [a_job()]
    assert second.orders([a_job().job]) == {a_job().job: order}
    assert second.sites() == [StoredSite(SiteId("a"), "{}")]
    assert [(line.what, line.epoch) for line in second.audit()] == [("x", epoch)]
    second.close()


def test_an_older_term_can_write_nothing(store: Store) -> None:
    old = store.begin_term(1, "old")
    new = store.begin_term(2, "new")
    assert new == old + 1
    with pytest.raises(LostLeadershipError):
        store.apply(Recording(old, (a_job(),)))
    assert list(store.open_jobs()) == []


def test_an_older_version_of_a_job_undoes_the_whole_transaction(store: Store) -> None:
    epoch = store.begin_term(1, "here")
    store.apply(Recording(epoch, (a_job(version=3),)))
    with pytest.raises(StaleRecordError):
        store.apply(Recording(epoch, (a_job(2), a_job(version=2)), audit=(AuditLine(1, "x"),)))
    assert list(store.open_jobs()) == [a_job(version=3)]
    assert store.audit() == []


def test_an_order_once_recorded_keeps_its_bytes(store: Store) -> None:
    epoch = store.begin_term(1, "here")
    order = StoredOrder(a_job().job, Digest("d"), "first")
    store.apply(Recording(epoch, orders=(order,)))
    store.apply(Recording(epoch, orders=(replace(order, envelope="second"),)))
    assert store.orders([order.job])[order.job].envelope == "first"


def test_open_jobs_come_in_pages_and_ended_ones_stay_out(store: Store) -> None:
    epoch = store.begin_term(1, "here")
    store.apply(Recording(epoch, tuple(a_job(n) for n in range(1201))))
    store.apply(Recording(epoch, (a_job(7, version=2, status="FAILED", terminal=True),)))
    assert len(list(store.open_jobs())) == 1200
    assert [job.status for job in store.recent_ended_jobs(10)] == ["FAILED"]
    assert store.count_jobs() == {"QUEUED": 1200, "FAILED": 1}
    assert [job.job for job in store.jobs(limit=2, offset=1)] == [a_job(1199).job, a_job(1198).job]


def test_a_newer_schema_is_refused_with_a_sentence(url: str, tmp_path: Path) -> None:
    Store(url).close()
    with sqlite3.connect(tmp_path / "record.db") as connection:
        connection.execute("UPDATE edif_schema SET version = 99")
    with pytest.raises(ConfigError, match=r"schema 99; this release knows schemas up to \d+"):
        Store(url)


@pytest.mark.parametrize("bad", ["nonsense", "sqlite://", "sqlite:///:memory:", "madeup://host/x"])
def test_a_database_url_of_no_use_is_a_sentence(bad: str) -> None:
    with pytest.raises(ConfigError, match="database_url"):
        Store(bad)


def test_a_second_coordinator_on_the_same_database_is_refused(url: str) -> None:
    first = Leadership(url)
    with pytest.raises(ConfigError, match=rf"process {os.getpid()}\) already leads"):
        Leadership(url)
    first.release()
    Leadership(url).release()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_sentence_and_loses_nothing(small_disk: Path) -> None:
    store = Store(f"sqlite:///{small_disk}/record.db")
    epoch = store.begin_term(1, "here")
    store.apply(Recording(epoch, (a_job(),)))
    big = StoredOrder(a_job(2).job, Digest("d"), "x" * 2_000_000)
    with pytest.raises(RecordFullError, match="Nothing was lost"):
        store.apply(Recording(epoch, (a_job(2),), orders=(big,)))
    assert list(store.open_jobs()) == [a_job()]
    store.apply(Recording(Epoch(epoch), (a_job(3),)))
    assert [job.job for job in store.open_jobs()] == [a_job().job, a_job(3).job]
    store.close()
