"""What a site keeps for its endpoint, which requests it reads, and how a client chooses its way."""

from __future__ import annotations

from pathlib import Path

import pytest

from edif_mesh.domain.ids import AttemptNumber, JobId, KeyId, SiteId
from edif_mesh.errors import NotFoundError, WireError
from edif_mesh.results import path_choice
from edif_mesh.results.index import Index
from edif_mesh.results.path_choice import Known, Measured
from edif_mesh.results.path_choice import Path as Way
from edif_mesh.results.transfer import AsIs
from site_agent.direct.certificate import certificate
from site_agent.direct.kept import KeptResult
from site_agent.direct.requests import parse_head, parse_numbers
from site_agent.direct.store import WORTH_BYTES, KeepingForm, ResultStore

ONE, ADA = AttemptNumber(1), KeyId("ada")
HOUR_MS = 3_600_000
PIECE = bytes(range(256)) * 2048


def job(number: int) -> JobId:
    return JobId(f"j{number:023x}")


def keep(store: ResultStore, number: int, pieces: int = 10, *, finished: bool = True) -> bool:
    """Keep a result of so many chunks of 512 KiB, in an order in which threads may have made them."""
    keeping = store.open(job(number), ONE, ADA)
    form = KeepingForm(AsIs(), keeping)
    order = [*range(1, pieces), 0]
    made = {n: form.make(n, (memoryview(bytes([n]) + PIECE[1:]),), 0) for n in order}
    return finished and keeping.finish(Index([made[n].entry for n in range(pieces)]))


def test_chunks_are_given_by_number_in_whatever_order_they_were_made(tmp_path: Path) -> None:
    assert keep(ResultStore(tmp_path, 1 << 30, HOUR_MS), 1)
    kept = KeptResult.open(tmp_path, job(1), ONE)
    assert kept.owner == ADA
    given = b"".join(kept.spans([0, 1, 2, 4]))
    assert [given[n << 19] for n in range(4)] == [0, 1, 2, 4]
    with pytest.raises(NotFoundError):
        kept.spans([10])


def test_the_oldest_make_room_and_what_is_too_large_is_not_kept(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, 12 << 20, HOUR_MS)
    assert all(keep(store, number) for number in (1, 2, 3))
    with pytest.raises(NotFoundError):
        KeptResult.open(tmp_path, job(1), ONE)
    assert KeptResult.open(tmp_path, job(2), ONE)
    assert not keep(store, 4, pieces=26)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.data")) <= 12 << 20


def test_a_restart_keeps_what_was_finished_and_removes_the_rest(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, 1 << 30, HOUR_MS)
    keep(store, 1)
    keep(store, 2, finished=False)
    assert len(list(tmp_path.glob("*.data"))) == 2
    again = ResultStore(tmp_path, 1 << 30, HOUR_MS)
    assert [file.name for file in tmp_path.glob("*.data")] == [f"{job(1)}.1.data"]
    again.drop(job(1))
    assert list(tmp_path.iterdir()) == []
    keep(again, 3)
    ResultStore(tmp_path, 1 << 30, -1)
    assert list(tmp_path.iterdir()) == []


def test_a_small_result_is_not_kept(tmp_path: Path) -> None:
    assert not keep(ResultStore(tmp_path, 1 << 30, HOUR_MS), 1, pieces=(WORTH_BYTES >> 19) - 1)
    assert list(tmp_path.iterdir()) == []


def test_the_certificate_stays_and_is_for_its_owner_s_eyes(tmp_path: Path) -> None:
    file = tmp_path / "certificate.pem"
    assert certificate(file, SiteId("ansbach")) == certificate(file, SiteId("ansbach"))
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_request_is_read(tmp_path: Path) -> None:
    asked = parse_head(f"GET /v1/results/{job(1)}/2/chunks?numbers=0-2,7 HTTP/1.1\r\nAuthorization: EDIF abc".encode())
    assert (asked.job, asked.attempt, asked.envelope) == (job(1), 2, "abc")
    assert [n for part in asked.chunks for n in part] == [0, 1, 2, 7]


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"GET / HTTP/1.1",
        b"POST /v1/results/j00000000000000000000001a/1/chunks?numbers=1 HTTP/1.1",
        b"GET /v1/results/../../key.pem/1/index HTTP/1.1",
        b"GET /v1/results/j00000000000000000000001a/1/index HTTP/1.1\r\nContent-Length: 5",
        b"GET /v1/results/j00000000000000000000001a/1/index HTTP/1.1\r\nA: b\r\na: c",
        "GET /v1/results/j00000000000000000000001a/1/index HTTP/1.1\r\nA: \xe9".encode("latin-1"),
    ],
)
def test_what_is_no_request_of_ours_is_refused(head: bytes) -> None:
    with pytest.raises(WireError):
        parse_head(head)


@pytest.mark.parametrize(
    "text", ["", "-", "1-", "3-1", "1,,2", "0-99999999", "4194304", "0-4194303,0-4194303", "\u0661"]
)
def test_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(WireError):
        parse_numbers(text)


LARGE = 1 << 30


def test_small_results_come_by_the_broker_and_large_ones_measure_both_ways_first() -> None:
    assert path_choice.next_step(Known(), 1 << 20, 0) == path_choice.Step(Way.BROKER, 1 << 20)
    first = path_choice.next_step(Known(), LARGE, 0)
    assert first == path_choice.Step(Way.DIRECT, path_choice.PROBE_BYTES)
    known = path_choice.learnt(Known(), Way.DIRECT, 500e6, 0)
    second = path_choice.next_step(known, LARGE, 0)
    assert second.path is Way.BROKER
    assert second.at_most_bytes < LARGE
    for broker, best in ((300e6, Way.DIRECT), (800e6, Way.BROKER)):
        both = path_choice.learnt(known, Way.BROKER, broker, 0)
        assert path_choice.next_step(both, LARGE, 0) == path_choice.Step(best, LARGE)


def test_a_way_that_slows_down_is_left_and_tried_again_later() -> None:
    known = Known(Measured(100e6, 0), Measured(300e6, 0))
    assert path_choice.should_leave(known, Way.DIRECT)
    assert not path_choice.should_leave(known, Way.BROKER)
    assert path_choice.next_step(known, LARGE, 0).path is Way.BROKER
    assert path_choice.next_step(known, LARGE, 3_600_000).path is Way.DIRECT


def test_a_way_that_has_failed_is_left_aside_for_a_while() -> None:
    known = path_choice.barred(Known(Measured(900e6, 0), Measured(1e6, 0)), path_choice.BROKEN_MS, 0)
    assert path_choice.next_step(known, LARGE, path_choice.BROKEN_MS - 1) == path_choice.Step(Way.BROKER, LARGE)
    assert path_choice.next_step(known, LARGE, path_choice.BROKEN_MS).path is Way.DIRECT
