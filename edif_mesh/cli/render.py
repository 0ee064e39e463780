"""How the CLI shows things: tables for people, JSON for programs, one place for both."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_WIDE = 200
"""Columns of a table that goes to a file or a program: nobody there is helped by folded lines."""
out = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE)
err = Console(stderr=True, highlight=False)

_COLOURS = {
    "SUCCEEDED": "green", "RUNNING": "cyan", "PLACED": "cyan", "QUEUED": "yellow", "FAILED": "red", "QUARANTINED": "red",
    "LOST": "red", "CANCELLED": "magenta", "EXPIRED": "magenta", "ACTIVE": "green", "SUSPECT": "yellow", "CORDONED": "yellow",
    "DRAINING": "yellow", "LOADED": "green", "LOADING": "cyan", "EVICTING": "magenta", "LOADABLE": "white",
}  # fmt: skip


def as_json(value: Any) -> None:
    """Print a value (dataclasses too) as JSON, exactly one document."""
    print(json.dumps(_plain(value), indent=2))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """Print a table; `empty` is the sentence for no rows."""
    rows = [list(row) for row in rows]
    if not rows:
        out.print(escape(empty))
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        shown.add_column(column, overflow="fold", no_wrap=number == 0)
    for row in rows:
        shown.add_row(*(_cell(text) for text in row))
    out.print(shown)


def say(text: str) -> None:
    """Print one sentence."""
    out.print(escape(text), soft_wrap=True)


def complain(text: str) -> None:
    """Print one sentence to standard error."""
    err.print(escape(text), style="red" if err.is_terminal else None, soft_wrap=True)


def ago(at_ms: int | None) -> str:
    """Return an instant as `12 s ago`."""
    if not at_ms:
        return "-"
    seconds = max(0, time.time() - at_ms / 1000)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def gigabytes(size: int) -> str:
    """Return bytes as GB."""
    return f"{size / 1e9:.1f} GB" if size >= 50_000_000 else f"{size / 1e6:.1f} MB"


def seconds(ms: int | None) -> str:
    """Return ms as seconds."""
    return "-" if ms is None else f"{ms / 1000:.2f} s"


def _cell(text: str) -> str:
    colour = _COLOURS.get(text)
    return f"[{colour}]{escape(text)}[/]" if colour else escape(text)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
