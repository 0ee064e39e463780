"""The constructs of nnsight's public documentation that can run remotely: one function each, by theme.

The tests run them (`test_nnsight_constructs.py`), and `page.py` makes docs/compatibility.md of them.
"""

from __future__ import annotations

from tests.contract.constructs import (
    asking,
    at_the_site,
    batching,
    changing,
    essentials,
    generating,
    gradient_limits,
    gradients,
    inside,
    jobs,
    mistakes,
    mistakes_of_form,
    operations,
    persisting,
    prompts,
    python_code,
    reading,
    recipes,
    refusing,
    running,
    sharing,
    values,
)
from tests.contract.constructs.construct import Construct, constructs_of

MODULES = (
    essentials, reading, changing, values, prompts, generating, batching, python_code, mistakes, mistakes_of_form, sharing,
    gradients, gradient_limits, inside, operations, persisting, recipes, at_the_site, running, jobs, asking, refusing,
)  # fmt: skip
THEMES: dict[str, tuple[Construct, ...]] = {
    (module.__doc__ or "").partition("\n")[0].rstrip("."): constructs_of(module) for module in MODULES
}
CONSTRUCTS: tuple[Construct, ...] = tuple(row for rows in THEMES.values() for row in rows)
ESSENTIALS: tuple[Construct, ...] = constructs_of(essentials)
