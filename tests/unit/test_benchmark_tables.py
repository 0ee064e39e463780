"""The tables of runners beside in-process: the fit, what failed, and the page around them."""

from pathlib import Path

import pytest

from benchmarks.beside import Report, Row, fit, plain_table
from benchmarks.runner import section, write


def a_row(trace: str, here_ms: float, there_ms: float, **other: object) -> Row:
    return Row("a model", trace, [here_ms] * 3, [there_ms] * 3, **other)  # type: ignore[arg-type]


def test_the_fit_finds_what_is_fixed_and_what_grows() -> None:
    rows = [a_row("short", 2, 9.2), a_row("long", 100, 117), a_row("longer", 1000, 1107)]
    assert fit(rows) == pytest.approx((1.1, 7.0))


def test_a_trace_that_a_peer_cannot_run_is_named_and_not_counted() -> None:
    rows = [
        a_row("one", 10, 30),
        a_row("two", 100, 120),
        Row("a model", "three", [50.0], failed="a.b.OutOfOrderError: no"),
    ]
    peer = Report("a peer", 3, rows=rows)
    assert fit(peer.rows) == pytest.approx((1.0, 20.0))
    assert "three failed: a.b.OutOfOrderError: no" in plain_table(peer)
    ours = Report("runner", 3, rows=[a_row("three", 50, 60), a_row("one", 10, 25)])
    assert "| a model | three | 50.0 | 60.0 | 1.20 | met |  |  | 50.0 | failed | OutOfOrderError |" in section(
        ours, peer
    )
    assert "| a model | one | 10.0 | 25.0 | 2.50 | 4.0 ms |" in section(ours, peer)


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Before\n")
    for there in (11.0, 12.5):
        write(Report("runner", 3, rows=[a_row("one", 10, there)]), None, page)
        page.write_text(page.read_text() + "by hand\n" if "by hand" not in page.read_text() else page.read_text())
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("by hand\n")
    assert "12.5" in text
    assert "11.0" not in text


def test_figures_survive_their_file(tmp_path: Path) -> None:
    report = Report("runner", 3, "a machine", "2026-01-01", [a_row("one", 10, 12, busy_ms=[20.0], equal=False)])
    report.save(tmp_path / "figures.json")
    assert Report.load(tmp_path / "figures.json") == report
