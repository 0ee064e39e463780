"""Another way of running a trace beside the same trace in-process: rows, ratios, the fit, tables, and their JSON.

Used by `benchmarks.runner` and by `benchmarks/peers`, whose environments have neither the mesh nor its requirements.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

AIM_RATIO, AIM_MS = 1.1, 10.0
"""What a runner may take: this many times in-process, plus this."""


@dataclass
class Row:
    """One trace on one model; all lists are milliseconds, one a run, the two cases in turn."""

    model: str
    trace: str
    here_ms: list[float] = field(default_factory=list)
    """In-process."""
    there_ms: list[float] = field(default_factory=list)
    """From the payload handed over to the values decoded, one job every so often."""
    busy_ms: list[float] = field(default_factory=list)
    """The same, each job sent when the one before it ended."""
    here_cpu_ms: list[float] = field(default_factory=list)
    there_cpu_ms: list[float] = field(default_factory=list)
    """Processor time of this process, and of the runner, where it was counted: steadier than time on a busy machine."""
    failed: str = ""
    """Why the other way could not run it; then only `here_ms` says something."""
    equal: bool = True
    """Every result was equal to the bit to the in-process one."""

    @property
    def here(self) -> float:
        """Median in-process."""
        return statistics.median(self.here_ms)

    @property
    def there(self) -> float:
        """Median of the other way."""
        return statistics.median(self.there_ms)

    @property
    def busy(self) -> float | None:
        """Median back to back; None when it was not measured."""
        return statistics.median(self.busy_ms) if self.busy_ms else None


@dataclass
class Report:
    """All rows of one run, and under what conditions they were measured."""

    what: str
    """What stood beside the in-process trace, with its version."""
    runs: int
    conditions: str = ""
    date: str = ""
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def new(cls, what: str, runs: int) -> Report:
        """Begin a report of this machine, today."""
        return cls(what, runs, conditions(), datetime.date.today().isoformat())

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote."""
        value = json.loads(path.read_text())
        return cls(**{**value, "rows": [Row(**row) for row in value["rows"]]})


def fit(rows: list[Row]) -> tuple[float, float]:
    """Return a and b of `there = a * here + b ms`: least squares over the medians, each weighted by 1 / here.

    The weights let short traces say what is fixed and keep one long trace from settling everything.
    """
    rows = [row for row in rows if not row.failed]
    if not rows:
        return 0.0, 0.0
    weights = [1 / row.here for row in rows]
    total = sum(weights)
    x = sum(w * row.here for w, row in zip(weights, rows, strict=True)) / total
    y = sum(w * row.there for w, row in zip(weights, rows, strict=True)) / total
    spread = sum(w * (row.here - x) ** 2 for w, row in zip(weights, rows, strict=True))
    a = (
        sum(w * (row.here - x) * (row.there - y) for w, row in zip(weights, rows, strict=True)) / spread
        if spread
        else 1.0
    )
    return a, y - a * x


COLUMNS = ("in-process ms", "there ms", "difference", "ratio", "over the aim by", "back to back ms", "equal")


def cells(row: Row) -> tuple[str, ...]:
    """Return one row under COLUMNS."""
    if row.failed:
        return (f"{row.here:.1f}", "failed", "", "", "", "", "")
    over = row.there - (AIM_RATIO * row.here + AIM_MS)
    return (
        f"{row.here:.1f}",
        f"{row.there:.1f}",
        f"{row.there - row.here:+.1f}",
        f"{row.there / row.here:.2f}",
        f"{over:.1f}" if over > 0 else "met",
        "" if row.busy is None else f"{row.busy:.1f}",
        "yes" if row.equal else "NO",
    )


def plain_table(report: Report) -> str:
    """Return the report for a terminal."""
    rows = [("model", "trace", *COLUMNS)] + [(row.model, row.trace, *cells(row)) for row in report.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    a, b = fit(report.rows)
    failures = [f"{row.model}, {row.trace} failed: {row.failed}" for row in report.rows if row.failed]
    return "\n".join(
        [
            *failures,
            f"{report.what}: {report.conditions}; medians of {report.runs}",
            *lines,
            f"fit: {a:.2f} x in-process {b:+.1f} ms",
        ]
    )


def conditions() -> str:
    """Name the machine and the versions; nothing that identifies it."""
    model = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    return (
        f"{os.cpu_count()} cores ({model}), Python {'.'.join(map(str, sys.version_info[:3]))}, torch {version('torch')} on CPU, one thread, "
        f"nnsight {version('nnsight')}, transformers {version('transformers')}, load average {os.getloadavg()[0]:.1f}"
    )
