"""The page of measured figures, `docs/benchmarks.md`: a section for each benchmark, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def put_section(name: str, text: str, path: Path) -> None:
    """Put a section between the marks of `name` into the page at `path`, at its end when it has none; the rest stays."""
    begin, end = f"<!-- {name}: begin (written by `python -m benchmarks.{name} --write`) -->", f"<!-- {name}: end -->"
    page = path.read_text()
    before, found, rest = page.partition(begin)
    after = rest.partition(end)[2] if found else ""
    before = before if found else page.rstrip() + "\n\n"
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{after or chr(10)}")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return head + ["| " + " | ".join(row) + " |" for row in rows]
