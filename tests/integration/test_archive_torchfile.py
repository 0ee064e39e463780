"""What the gateway writes loads in the unmodified client: plain torch.load, with the client's own classes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import types
from collections import namedtuple
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from edif_mesh.errors import ArchiveError
from edif_mesh.results.archive import plan
from edif_mesh.results.archive_types import DTYPES
from edif_mesh.results.torchfile import write_torch_save
from tests.same_values import assert_same, assert_same_strides
from tests.saved_values import SAVED

Pair = namedtuple("Pair", "left right")


class Colour(Enum):
    RED = "red"


class Mine:
    def __init__(self) -> None:
        self.score = 2


def loaded(values: dict[str, Any], *, compress: bool = False) -> dict[str, Any]:
    out = io.BytesIO()
    count = write_torch_save(plan(values).to_bytes(), out, compress=compress)
    blob = out.getvalue()
    assert count == len(blob)
    if compress:
        assert zstandard.frame_content_size(blob) > 0
        blob = zstandard.ZstdDecompressor().decompress(blob)
    return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=False)


@pytest.mark.parametrize("compress", [False, True])
def test_values_arrive_exactly(compress: bool) -> None:
    base = torch.randn(4, 5)
    values = {
        "t": base, "view": base[1:], "half": torch.randn(3).to(torch.bfloat16), "f8": torch.ones(2).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 3), "grad": torch.ones(1, requires_grad=True), "n": [1, {"a": (None, b"x", 2**90)}],
        "np": np.arange(3), "size": torch.Size([1]), "dtype": torch.float16, "u16": torch.ones(2, dtype=torch.uint16),
    }  # fmt: skip
    assert_same(loaded(values, compress=compress), values)


@pytest.mark.parametrize("kind", SAVED)
def test_every_kind_loads_as_it_was(kind: str) -> None:
    values = SAVED[kind]()
    back = loaded(values)
    assert_same(back, values)
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized:
            assert_same_strides(back[name], value)


def test_two_dtypes_over_one_storage_do_not_stop_the_result() -> None:
    floats = torch.randn(8)
    data = plan({"f": floats, "i": floats.view(torch.int32), "p": torch.nn.Parameter(floats.clone())}).to_bytes()
    forged = re.sub(rb'"s":[012]', b'"s":0', data)
    out = io.BytesIO()
    write_torch_save(forged, out, compress=False)
    back = torch.load(io.BytesIO(out.getvalue()), weights_only=False)
    assert torch.equal(back["f"].view(torch.int32), back["i"])
    assert type(back["p"]) is torch.nn.Parameter


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_loads(name: str) -> None:
    value = torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8).view(-1).repeat(16).view(DTYPES[name])
    assert_same(loaded({"x": value, "e": value[:0]}), {"x": value, "e": value[:0]})


def test_shared_views_are_written_once_and_still_share() -> None:
    base = torch.randn(100_000)
    out = io.BytesIO()
    assert write_torch_save(plan({"a": base, "b": base[:50_000]}).to_bytes(), out, compress=False) < 410_000
    back = torch.load(io.BytesIO(out.getvalue()), weights_only=False)
    back["a"][0] = 3.0
    assert back["b"][0] == 3.0


def test_classes_that_the_gateway_does_not_know_arrive_as_plain_objects() -> None:
    back = loaded({"mine": Mine(), "pairs": [Pair(1, 2), Pair(3, 4)], "colour": Colour.RED})
    assert type(back["mine"]) is types.SimpleNamespace
    assert back["mine"].score == 2
    assert back["mine"].type_name == f"{__name__}.Mine"
    assert [p.right for p in back["pairs"]] == [2, 4]
    assert back["colour"] == "red"


def test_an_activation_cache_is_real_at_the_client_and_needs_no_nnsight_at_the_gateway(tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "result.pt"
    client = (
        "import sys, torch\n"
        "from nnsight.intervention.cache import Cache, CacheView, Entry\n"
        "cache = Cache(None)\n"
        "cache.entries = {'model.h.0': [Entry(output=(torch.ones(2), None), inputs=((torch.zeros(1),), {'a': 1}))],\n"
        "                 'model.h.1': [Entry(output=torch.ones(1)), Entry(output=torch.zeros(1))]}\n"
        "view = CacheView(cache, None)\n"
    )
    write = "from edif_mesh.results.archive import plan\nopen(sys.argv[1], 'wb').write(plan({'c': view}).to_bytes())\n"
    gateway = (
        "import sys, pathlib\n"
        "from edif_mesh.results.torchfile import write_torch_save\n"
        "write_torch_save(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), compress=False)\n"
        "assert 'nnsight' not in sys.modules\n"
    )
    check = (
        "back = torch.load(sys.argv[2], weights_only=False)['c']\n"
        "assert type(back) is CacheView and back.keys() == ['model.h.0', 'model.h.1'], back\n"
        "assert type(back._cache) is Cache and type(back._cache.entries['model.h.0'][0]) is Entry\n"
        "assert back['model.h.0'].output[0].tolist() == [1, 1] and back['model.h.0'].input.tolist() == [0]\n"
        "assert len(back['model.h.1'].output) == 2\n"
        "from edif_mesh.results.archive import read\n"
        "assert type(read(sys.argv[1])['c']) is CacheView\n"
    )
    for code in (client + write, gateway, client + check):
        done = subprocess.run(
            [sys.executable, "-c", code, str(archive), str(out)],
            timeout=120,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_nothing_is_written_from_what_is_no_archive() -> None:
    out = io.BytesIO()
    with pytest.raises(ArchiveError):
        write_torch_save(b"\x80\x04cos\nsystem\n", out, compress=False)
    assert out.getvalue() == b""
