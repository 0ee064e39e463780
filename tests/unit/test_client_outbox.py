"""The researcher's outbox: what a crash or a full disk may and may not lose."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from edif_mesh.client.outbox import Outbox
from edif_mesh.domain.ids import job_id
from edif_mesh.domain.job import Failure
from edif_mesh.errors import StoreFullError

OLD, NEW = job_id(1_700_000_000_000, 1), job_id(1_700_000_001_000, 2)


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox")


def test_an_order_waits_with_its_payload_until_it_is_recorded(outbox: Outbox) -> None:
    outbox.keep(NEW, "new order", b"new")
    outbox.keep(OLD, "old order", b"old")
    assert Outbox(outbox.folder).unrecorded() == [OLD, NEW]
    outbox.recorded(OLD)
    assert outbox.unrecorded() == [NEW]
    assert (outbox.order(OLD), outbox.payload(OLD), outbox.waits(OLD)) == ("old order", None, False)


def test_of_a_refused_order_the_reason_stays(outbox: Outbox) -> None:
    outbox.keep(OLD, "order", b"payload")
    outbox.refused(OLD, Failure("expired", "The order is too old."))
    assert [path.name for path in outbox.folder.iterdir()] == [f"{OLD}.refused"]
    assert Outbox(outbox.folder).refusal(OLD) == Failure("expired", "The order is too old.")
    assert outbox.refusal(NEW) is None


def test_of_an_order_that_was_never_sent_nothing_stays(outbox: Outbox) -> None:
    outbox.keep(OLD, "order", b"payload")
    outbox.withdrawn(OLD)
    assert list(outbox.folder.iterdir()) == []


def test_only_its_owner_may_read_it(outbox: Outbox) -> None:
    outbox.keep(OLD, "order", b"payload")
    assert {path.stat().st_mode & 0o077 for path in [outbox.folder, *outbox.folder.iterdir()]} == {0}


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFullError, match="was not submitted"):
        outbox.keep(OLD, "order", b"payload")
    assert outbox.unrecorded() == []
    assert list(outbox.folder.glob("*.new")) == []


def test_strays_of_a_crash_go_after_a_day_and_waiting_orders_stay(outbox: Outbox) -> None:
    outbox.keep(OLD, "order", b"waits")
    strays = [outbox.folder / f"{NEW}.payload", outbox.folder / f"{NEW}.order.new"]
    for stray in strays:
        stray.write_bytes(b"half")
    outbox.prune()
    assert all(stray.exists() for stray in strays)
    for path in outbox.folder.iterdir():
        os.utime(path, (time.time() - 2 * 86_400,) * 2)
    outbox.prune()
    assert not any(stray.exists() for stray in strays)
    assert outbox.unrecorded() == [OLD]
