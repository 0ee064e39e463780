"""The one line of a failure that tables show: what a researcher would read first."""

from __future__ import annotations

import pytest

from edif_mesh.domain.job import Failure

REFUSED = "'probe' is a Linear, which cannot leave the site as data. Save its state_dict() instead."


@pytest.mark.parametrize(
    ("code", "text", "line"),
    [
        ("user_error", "Traceback (most recent call last):\n  File ...\nZeroDivisionError: division by zero\n", "ZeroDivisionError: division by zero"),
        ("unsupported_value", f"{REFUSED}\nRefused at once, where it is saved: File ...\n    probe = lin.save()", REFUSED),
        ("wall_time", "The job ran too long.", "The job ran too long."),
        ("user_error", "", ""),
    ],
)  # fmt: skip
def test_it_is_the_last_of_a_traceback_and_the_first_of_a_sentence(code: str, text: str, line: str) -> None:
    assert Failure(code, text).line == line
