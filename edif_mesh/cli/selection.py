"""What `edif fetch --only` names: `acts`, `acts[:, -1]`, `layers.3[0, 5:9]`; read without running anything."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any

from edif_mesh.errors import ConfigError

_HOW = "Write NAME or NAME[INDEX] with a name that `edif show JOB --values` lists, and an index of numbers, `:`, `...` and lists of numbers"


def find(text: str, names: Iterable[str]) -> tuple[list[str], tuple[Any, ...] | None]:
    """Return the names of the leaves that `text` means, and its index or None.

    A name of a list or dictionary means all of its parts. Raises ConfigError with what to write instead.
    """
    names = list(names)
    if found := _below(text, names):
        return found, None
    if text.endswith("]"):
        for place in (number for number, letter in enumerate(text) if letter == "["):
            if text[:place] in names:
                return [text[:place]], _index(text[place:], text)
    known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    raise ConfigError(f"{text!r} is nothing that was saved. {_HOW}. There is: {known}.")


def select(values: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """Return what `wanted` means of the leaves by name; what has an index is called as it was written.

    Raises ConfigError, also for an index that does not fit.
    """
    chosen: dict[str, Any] = {}
    for text in wanted:
        found, index = find(text, values)
        for name in found:
            if index is None:
                chosen[name] = values[name]
                continue
            try:
                chosen[text] = values[name][index]
            except (IndexError, TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(f"{text!r} does not fit what was saved: {str(error).splitlines()[0]}") from error
    return chosen


def _below(text: str, names: list[str]) -> list[str]:
    return [name for name in names if name == text] or [name for name in names if name.startswith(f"{text}.")]


def _index(text: str, whole: str) -> tuple[Any, ...]:
    try:
        tree = ast.parse("x" + text, mode="eval").body
        if not isinstance(tree, ast.Subscript) or not isinstance(tree.value, ast.Name):
            raise ValueError("no index")
        parts = tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]
        return tuple(_part(part) for part in parts)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{whole!r} has no index that can be read. {_HOW}.") from error


def _part(node: ast.expr) -> Any:
    if isinstance(node, ast.Slice):
        return slice(*(None if end is None else _number(end) for end in (node.lower, node.upper, node.step)))
    if isinstance(node, ast.List):
        return [_number(part) for part in node.elts]
    if isinstance(node, ast.Constant) and node.value in (None, ...) and not isinstance(node.value, int):
        return node.value
    return _number(node)


def _number(node: ast.expr) -> int:
    minus = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    found = node.operand if isinstance(node, ast.UnaryOp) and minus else node
    if not isinstance(found, ast.Constant) or type(found.value) is not int:
        raise ValueError("no number")
    return -found.value if minus else found.value
