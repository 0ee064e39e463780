"""`edif fetch --only`: what is written is found among the saved names, and read without running anything."""

from __future__ import annotations

import pytest
import torch

from edif_mesh.cli.selection import find, select
from edif_mesh.errors import ConfigError

NAMES = ["acts", "layers.0", "layers.1", "cache.h[0].mlp", "cache.h[0].mlp[1]"]


@pytest.mark.parametrize(
    ("text", "names", "index"),
    [
        ("acts", ["acts"], None),
        ("acts[3]", ["acts"], (3,)),
        ("acts[:, -1]", ["acts"], (slice(None), -1)),
        ("acts[..., 1:9:2, None]", ["acts"], (..., slice(1, 9, 2), None)),
        ("acts[[0, -2]]", ["acts"], ([0, -2],)),
        ("layers", ["layers.0", "layers.1"], None),
        ("layers.1[0]", ["layers.1"], (0,)),
        ("cache.h[0].mlp", ["cache.h[0].mlp"], None),
        ("cache.h[0].mlp[1]", ["cache.h[0].mlp[1]"], None),
        ("cache.h[0].mlp[2]", ["cache.h[0].mlp"], (2,)),
    ],
)
def test_what_is_written_is_found(text: str, names: list[str], index: object) -> None:
    assert find(text, NAMES) == (names, index)


@pytest.mark.parametrize(
    "text",
    ["", "nothing", "acts[", "acts]", "acts[]", "acts[1][2]", "acts[exit()]", "acts[x]", "acts[1.5]", "acts[True]", "acts['a']",
     "acts[1 if 1 else 2]", "acts[2**9]", "acts[~1]", "acts[:", "acts[" + "(" * 5000 + "]", "acts[0].x", "layers[0]"],
)  # fmt: skip
def test_what_cannot_be_meant_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="edif show JOB --values"):
        find(text, NAMES)


def test_an_index_that_does_not_fit_is_a_sentence() -> None:
    values = {"acts": torch.arange(6).reshape(2, 3), "n": 3}
    assert select(values, ["acts[:, 1]"])["acts[:, 1]"].tolist() == [1, 4]
    for text in ("acts[5]", "acts[0, 0, 0]", "n[0]"):
        with pytest.raises(ConfigError, match="does not fit"):
            select(values, [text])
