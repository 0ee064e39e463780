"""`edif fetch -o FILE.safetensors`: tensors under dotted names, the rest named in the metadata."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from edif_mesh.errors import ResultError
from edif_mesh.results.archive import plan, read
from edif_mesh.results.export import leaves, to_safetensors
from tests.saved_values import SAVED


def test_nested_tensors_get_dotted_names_and_other_leaves_are_listed(tmp_path: Path) -> None:
    base = torch.randn(3, 4)
    values = {"acts": [base, {"mlp": base.T}], "row": base[1], "name": "x", "np": np.arange(2), "s": base.to_sparse()}
    left_out = to_safetensors(read(plan(values).to_bytes()), tmp_path / "o.safetensors")
    assert left_out == ["name", "s"]
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        assert set(file.keys()) == {"acts.0", "acts.1.mlp", "row", "np"}
        assert torch.equal(file.get_tensor("acts.1.mlp"), base.T)
        assert torch.equal(file.get_tensor("row"), base[1])
        assert json.loads(file.metadata()["left_out"]) == ["name", "s"]


@pytest.mark.parametrize("kind", SAVED)
def test_every_kind_is_written_or_listed(kind: str, tmp_path: Path) -> None:
    values = read(plan(SAVED[kind]() | {"one": torch.ones(1)}).to_bytes())
    left_out = to_safetensors(values, tmp_path / "o.safetensors")
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        assert sorted([*file.keys(), *left_out]) == sorted(name for name, _ in leaves(values))


def test_a_name_that_two_tensors_would_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"a\.b"):
        to_safetensors({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, tmp_path / "o")


def test_a_result_without_tensors_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no tensor"):
        to_safetensors({"a": 1}, tmp_path / "o")
    assert not (tmp_path / "o").exists()
