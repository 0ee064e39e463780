"""docs/compatibility.md is what `make docs` makes of the constructs, and its examples are lines of their code."""

from __future__ import annotations

from tests.contract.constructs import CONSTRUCTS, THEMES
from tests.contract.constructs.page import PAGE, compatibility_page
from tests.mesh import ROOT


def test_the_page_is_what_the_generator_makes() -> None:
    assert (ROOT / PAGE).read_text() == compatibility_page(), "Run `make docs` and commit the page."


def test_every_example_is_in_the_code_that_runs() -> None:
    assert [c.id for c in CONSTRUCTS if not c.example_is_in_the_code()] == []


def test_names_are_stable_keys_and_every_theme_has_rows() -> None:
    assert len({c.id for c in CONSTRUCTS}) == len(CONSTRUCTS)
    assert all(THEMES.values())


def test_a_row_says_one_thing() -> None:
    assert [c.id for c in CONSTRUCTS if c.refused is not None and c.differs is not None] == []
