"""The format byte for byte: an archive written by an older release must stay readable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edif_mesh.results.archive import plan, read
from tests.same_values import assert_same

GOLDEN = Path(__file__).parents[1] / "golden"
NEWEST = GOLDEN / "archive-v2.bin"


def values() -> dict[str, Any]:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    shared = [1, 2.5, None]
    return {
        "logits": base,
        "last": base[-1],
        "bf16": torch.tensor([1.5, -2.0]).to(torch.bfloat16),
        "nested": {"acts": [shared, shared, ("a", b"bytes", -(2**70))], 3: float("inf")},
        "flag": torch.tensor(True),
    }


@pytest.mark.parametrize("version", ["archive-v1.bin", NEWEST.name])
def test_the_golden_archive_is_still_read(version: str) -> None:
    assert_same(read(GOLDEN / version), values())


def test_the_same_values_give_the_golden_bytes() -> None:
    assert plan(values()).to_bytes() == NEWEST.read_bytes()
