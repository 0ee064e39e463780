"""Which tensors of an archive can be lazy, and which storages everything else is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edif_mesh.results.archive_records import Tree

LAZY_BYTES = 64 << 10
"""A smaller tensor comes with its neighbours anyway."""
_WALKED = frozenset(
    "list tuple dict ordered defaultdict deque namedtuple namespace object torch_return activation_cache".split()
)
"""Containers that take a LazyTensor as well as a tensor; transformers' outputs and caches look into theirs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`lazy`: the `id()` of each node that becomes a LazyTensor; `whole`: numbers of the storages that are needed at once."""

    lazy: frozenset[int]
    whole: frozenset[int]


def plan_of(tree: Tree) -> Plan:
    """Return the plan for a tree, of which nothing but the places of its storages has been checked."""
    lazy: set[int] = set()
    needed: set[int] = set()
    referred = False
    stack: list[tuple[Any, bool]] = [(value, True) for value in tree.values]
    while stack:
        node, may_be_lazy = stack.pop()
        if isinstance(node, list):
            stack.extend((part, may_be_lazy) for part in node)
        if not isinstance(node, dict):
            continue
        kind, number = str(node.get("t")), _storage_of(node, tree)
        large = number is not None and tree.storages[number][1] >= LAZY_BYTES
        if may_be_lazy and kind == "tensor" and "p" not in node and large:
            lazy.add(id(node))
            continue
        referred |= kind == "ref" and not may_be_lazy
        if number is not None:
            needed.add(number)
        stack.extend((part, may_be_lazy and kind in _WALKED) for part in node.values())
    if referred:  # a cache may stand for a tensor that came before it, and needs a real one
        return Plan(frozenset(), frozenset(range(len(tree.storages))))
    return Plan(frozenset(lazy), frozenset(needed))


def _storage_of(node: dict[str, Any], tree: Tree) -> int | None:
    """The number of the storage that a node names, when there is one of that number."""
    number = node.get("s")
    return number if type(number) is int and 0 <= number < len(tree.storages) else None
