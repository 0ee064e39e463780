"""Rules about the source, as functions over a parsed module: each returns the offences, so that tests can feed it bad code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("edif_mesh", "coordinator", "site_agent")

IMPURE_MODULES = frozenset(
    "asyncio datetime http io logging multiprocessing os pathlib random secrets shutil signal socket sqlite3 subprocess sys "
    "tempfile threading time urllib uuid numpy torch nats sqlmodel pydantic".split()
)
IMPURE_CALLS = frozenset({"open", "print", "input", "exec", "eval", "__import__", "globals", "id", "hash"})
PICKLES = frozenset({"pickle", "cloudpickle", "dill", "marshal", "shelve"})


def sources(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    """Yield every module under the folders, parsed."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(), str(path))


def imported(tree: ast.Module) -> set[str]:
    """Return the modules that a module imports, wherever in it, by their dotted names."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def impure(tree: ast.Module) -> list[str]:
    """Clock, randomness and I/O in what must be plain functions over plain values."""
    found = [f"imports {name}" for name in sorted(imported(tree)) if name.split(".")[0] in IMPURE_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
            found.append(f"line {node.lineno} calls {node.func.id}()")
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.Global):
            found.append(f"line {node.lineno}: {type(node).__name__}")
    return found


def unpickles(tree: ast.Module) -> list[str]:
    """Everything that can turn bytes into running code: pickle and its kin, and torch.load without its safe mode."""
    found = [f"imports {name}" for name in sorted(imported(tree)) if name.split(".")[0] in PICKLES]
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("load", "deserialize")
        ):
            owner = ast.unparse(node.func.value)
            safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
            if (owner == "torch" and not safe) or owner == "RequestModel":
                found.append(f"line {node.lineno} calls {owner}.{node.func.attr}")
    return found


def undocumented(tree: ast.Module) -> list[str]:
    """Public modules, classes and functions without a docstring."""
    found = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        named = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if named and not node.name.startswith("_") and not ast.get_docstring(node):
            found.append(node.name)
    return found


def mutable_globals(tree: ast.Module) -> list[str]:
    """Module-level names bound to an empty list, dict or set: state that a test cannot reset."""
    found = []
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        empty = isinstance(value, ast.List | ast.Dict) and not (
            getattr(value, "elts", None) or getattr(value, "keys", None)
        )
        if empty or (isinstance(value, ast.Call) and ast.unparse(value) in ("list()", "dict()", "set()")):
            found.append(f"line {node.lineno}")
    return found
