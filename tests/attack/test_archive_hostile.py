"""An archive from a hostile child: every lie is an ArchiveError, and no number in it makes the reader allocate."""

from __future__ import annotations

import ast
import contextlib
import json
import random
import resource
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edif_mesh.results
from edif_mesh.errors import ArchiveError
from edif_mesh.results.archive import plan, read
from edif_mesh.results.archive_records import (
    DATA,
    HEAD,
    HEAD_BYTES,
    RECORD_BYTES,
    TAIL_BYTES,
    TREE,
    RecordReader,
    padding,
    parse_tail,
    record_head,
    tail,
)
from tests.saved_values import SAVED

BIG = 10**18


def forged(tree: Any, data: bytes = b"", *, text: bytes | None = None) -> bytes:
    """An archive with this tree, honest in its outer form (one storage at most) and nowhere else."""
    raw = json.dumps(tree).encode() if text is None else text
    body = HEAD + ((record_head(DATA, len(data)) + data + bytes(padding(len(data)))) if data else b"")
    at = len(body) + RECORD_BYTES
    body += record_head(TREE, len(raw)) + raw + bytes(padding(len(raw)))
    return body + tail(at, len(raw), len(body) + TAIL_BYTES)


STORAGE = HEAD_BYTES + RECORD_BYTES
"""Where the only storage lies."""


def one(node: Any, data: bytes = bytes(64)) -> bytes:
    return forged({"values": [["x", node]], "storages": [[STORAGE, len(data)]] if data else []}, data)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"t": "tensor", "d": "float32", "shape": [4, 4], "stride": [4, 1], "o": 0, "s": 0} | changes


def array(**changes: Any) -> dict[str, Any]:
    return {"t": "ndarray", "d": "<f4", "shape": [16], "s": 0} | changes


def quantized(**changes: Any) -> dict[str, Any]:
    whole = tensor(d="int8", shape=[4, 4])
    return {"t": "quantized", "d": "qint8", "v": whole, "scale": 0.5, "zero": 0} | changes


def encoding(**changes: Any) -> bytes:
    parts: dict[str, Any] = {"ids": [1], "type_ids": [0], "tokens": ["a"], "words": [0], "offsets": [[0, 1]]}
    parts |= {"special_tokens_mask": [0], "attention_mask": [1], "overflowing": [], "sequence_ranges": {}}
    return json.dumps(parts | changes).encode()


def references(kind: str, levels: int) -> list[Any]:
    nodes: list[Any] = [["v0", {"t": kind, "v": [1]}]]
    for level in range(levels):
        nodes.append([f"v{level + 1}", {"t": kind, "v": [{"t": "ref", "i": level}, {"t": "ref", "i": level}]}])
    return nodes


def test_the_forger_can_write_an_honest_archive() -> None:
    assert read(one(tensor()))["x"].shape == (4, 4)
    assert read(one(array()))["x"].shape == (16,)
    assert read(one(quantized()))["x"].shape == (4, 4)
    assert read(one({"t": "encoding", "s": 0}, encoding()))["x"].ids == [1]
    assert (
        read(one({"t": "cache", "c": "StaticCache", "v": [["StaticLayer", [["keys", None]]]]}))["x"].layers[0].keys
        is None
    )


LIES: dict[str, bytes] = {
    "nothing": b"",
    "short": HEAD,
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "tree of 4 GiB": forged({"values": [], "storages": []})[:-TAIL_BYTES] + tail(128, 0xFFFFFFFF, 256),
    "tree beyond the end": forged({"values": [], "storages": []})[:-TAIL_BYTES] + tail(192, 32, 256),
    "tree nowhere": forged({"values": [], "storages": []})[:-TAIL_BYTES] + tail(0, 192, 256),
    "another size": forged({"values": [], "storages": []})[:-TAIL_BYTES] + tail(128, 29, 1 << 40),
    "version 1, header of 4 GiB": struct.pack("<8sI", b"EDIFAR\x00\x01", 0xFFFFFFFF) + b"{}",
    "version 1, absent storage": struct.pack("<8sI", b"EDIFAR\x00\x01", 34) + b'{"values": [], "storages": [64]}   ',
    "not json": forged(None, text=b"{'values'"),
    "not utf-8": forged(None, text=b'{"values":[["\xff",1]],"storages":[]}'),
    "NaN": forged(None, text=b'{"values":[["a",NaN]],"storages":[]}'),
    "duplicate key": forged(None, text=b'{"values":[],"values":[["a",1]],"storages":[]}'),
    "duplicate key deep": forged(None, text=b'{"values":[["a",{"t":"int","v":"0x1","v":"0x2"}]],"storages":[]}'),
    "deep json": forged(None, text=b'{"values":' + b"[" * 100_000 + b"]" * 100_000 + b',"storages":[]}'),
    "digits": forged(None, text=b'{"values":[["a",' + b"9" * 100_000 + b']],"storages":[]}'),
    "same name twice": forged({"values": [["a", 1], ["a", 2]], "storages": []}),
    "values no list": forged({"values": {}, "storages": []}),
    "storages negative": forged({"values": [], "storages": [[128, -64]]}),
    "storages huge": forged({"values": [], "storages": [[128, BIG]]}),
    "storages bool": forged({"values": [], "storages": [[128, True]]}),
    "storages absent": forged({"values": [], "storages": [[128, 1 << 40]]}),
    "storages crooked": forged({"values": [], "storages": [[130, 4]]}, bytes(64)),
    "storages in the head": forged({"values": [], "storages": [[0, 64]]}, bytes(64)),
    "storages in the tree": forged({"values": [], "storages": [[192, 64]]}, bytes(64)),
    "storages twice": forged({"values": [], "storages": [[128, 64], [128, 32]]}, bytes(64)),
    "storages no pairs": forged({"values": [], "storages": [128, 64]}, bytes(64)),
    "trailing bytes": forged({"values": [], "storages": []}) + b"x",
    "deep tree": one(json.loads('{"t":"list","v":[' * 120 + "]}" * 120), b""),
    "unknown kind": one({"t": "pickle", "v": "x"}),
    "kind is a list": one({"t": [], "v": "x"}),
    "node is a list": one([1]),
    "reference ahead": one({"t": "ref", "i": 0}),
    "reference negative": one({"t": "list", "v": [{"t": "list", "v": []}, {"t": "ref", "i": -1}]}),
    "references explode": forged({"values": references("list", 60), "storages": []}),
    "hash explodes": forged({"values": [*references("tuple", 20), ["s", {"t": "set", "v": [{"t": "ref", "i": 20}]}]], "storages": []}),
    "references too deep": forged({"values": [["v0", {"t": "list", "v": []}]] + [[f"v{i + 1}", {"t": "tuple", "v": [{"t": "ref", "i": i}]}] for i in range(200)], "storages": []}),
    "unhashable key": one({"t": "set", "v": [{"t": "list", "v": []}]}),
    "double set member": one({"t": "set", "v": [1, 1]}),
    "double key": one({"t": "dict", "v": [[1, 2], [1, 3]]}),
    "half pair": one({"t": "dict", "v": [[1]]}),
    "dunder attribute": one({"t": "object", "c": "a.B", "v": [["__class__", 1]]}),
    "namedtuple code": one({"t": "namedtuple", "c": "a.B", "v": [["x=__import__('os')", 1]]}),
    "torch return": one({"t": "torch_return", "c": "__loader__", "v": []}),
    "torch return length": one({"t": "torch_return", "c": "topk", "v": [1]}),
    "device": one({"t": "device", "v": "nowhere"}),
    "dtype": one({"t": "dtype", "v": "load"}),
    "float": one({"t": "float", "v": "1"}),
    "surrogates": one({"t": "surrogates", "v": [1 << 40]}),
    "bytes without storage": one({"t": "bytes", "s": 7}),
    "tensor dtype": one(tensor(d="qint8")),
    "tensor dtype list": one(tensor(d=["float32"])),
    "tensor storage": one(tensor(s=1)),
    "tensor storage negative": one(tensor(s=-1)),
    "tensor storage bool": one(tensor(s=False)),
    "tensor shape": one(tensor(shape=[4, 5])),
    "tensor shape giant": one(tensor(shape=[BIG, BIG])),
    "tensor shape negative": one(tensor(shape=[-4, -4])),
    "tensor shape float": one(tensor(shape=[4.0, 4])),
    "tensor stride 1e18": one(tensor(stride=[BIG, 1])),
    "tensor stride negative": one(tensor(stride=[-4, 1])),
    "tensor stride short": one(tensor(stride=[1])),
    "tensor offset": one(tensor(o=1)),
    "tensor offset negative": one(tensor(o=-1)),
    "tensor repeats": one(tensor(shape=[1 << 20, 1 << 20], stride=[0, 0])),
    "tensor overflows": one(tensor(shape=[1 << 40, 1 << 40], stride=[0, 0])),
    "tensor dimensions": one(tensor(shape=[1] * 65, stride=[1] * 65)),
    "empty giant": one(tensor(shape=[0, 1 << 47, 1 << 47], stride=[1, 1 << 62, 1])),
    "bool bytes": one(tensor(d="bool", shape=[64], stride=[1]), b"\x02" * 64),
    "gradient of ints": one(tensor(d="int32", g=True)),
    "coo index": one({"t": "coo", "shape": [2], "parts": [tensor(d="int64", shape=[1, 8], stride=[8, 1]), tensor(shape=[8], stride=[1])]}, b"\x7f" * 64),
    "csr rows": one({"t": "csr", "shape": [7, 4], "parts": [tensor(d="int64", shape=[8], stride=[1])] * 2 + [tensor(shape=[8], stride=[1])]}, b"\x05" * 64),
    "numpy objects": one(array(d="|O8", shape=[8])),
    "numpy structure": one(array(d="f4,O", shape=[8])),
    "numpy no size": one(array(d="|S0", shape=[BIG])),
    "numpy shape": one(array(shape=[17])),
    "numpy shape giant": one(array(shape=[BIG, BIG])),
    "numpy text": one(array(d="<U16", shape=[1]), b"\xff" * 64),
    "numpy bool": one(array(d="|b1", shape=[64]), b"\x02" * 64),
    "kv layer": one({"t": "kv_cache", "v": [["StaticLayer", None, None, []]]}),
    "kv setting": one({"t": "kv_cache", "v": [["DynamicSlidingWindowLayer", None, None, ["a", 1]]]}),
    "bytes twice": one({"t": "list", "v": [{"t": "bytes", "s": 0}] * 2}),
    "tensor conjugate": one(tensor(t="lazy", j=True)),
    "tensor neg bool": one(tensor(t="lazy", d="bool", shape=[64], stride=[1], n=True)),
    "coo part no tensor": one({"t": "coo", "shape": [2], "parts": [{"t": "list", "v": []}] * 2}),
    "coo not coalesced": one({"t": "coo", "shape": [2], "k": True, "parts": [tensor(d="int64", shape=[1, 2], stride=[2, 1]), tensor(shape=[2], stride=[1])]}),
    "csc columns": one({"t": "csc", "shape": [4, 7], "parts": [tensor(d="int64", shape=[8], stride=[1])] * 2 + [tensor(shape=[8], stride=[1])]}, b"\x05" * 64),
    "bsr blocks": one({"t": "bsr", "shape": [4, 4], "parts": [tensor(d="int64", shape=[3], stride=[1]), tensor(d="int64", shape=[0], stride=[1]), tensor(shape=[2, 3, 2], stride=[6, 2, 1])]}),
    "bsr shape": one({"t": "bsr", "shape": [BIG, BIG], "parts": [tensor(d="int64", shape=[3], stride=[1])] * 3}),
    "quantized kind": one(quantized(d="quint4x2")),
    "quantized integers": one(quantized(d="qint32")),
    "quantized zero": one(quantized(zero=1 << 20)),
    "quantized scale": one(quantized(scale="1e9")),
    "quantized scales short": one(quantized(parts=[tensor(d="float64", shape=[3], stride=[1]), tensor(d="int64", shape=[3], stride=[1])], axis=0)),
    "quantized zeros kind": one(quantized(parts=[tensor(d="float64", shape=[4], stride=[1]), tensor(d="float64", shape=[4], stride=[1])], axis=0)),
    "quantized axis": one(quantized(parts=[tensor(d="float64", shape=[4], stride=[1]), tensor(d="int64", shape=[4], stride=[1])], axis=7)),
    "quantized repeats": one({"t": "list", "v": [quantized(v=tensor(d="int8", shape=[1 << 12, 1 << 12], stride=[0, 0]))] * 50}),
    "numpy dates": one(array(d="<M8[fortnight]", shape=[8])),
    "numpy dates no unit": one(array(d="<M8[0s]", shape=[8])),
    "numpy dtype": one({"t": "npdtype", "v": "O"}),
    "numpy dtype comma": one({"t": "npdtype", "v": "<f4,<f4"}),
    "date": one({"t": "date", "v": [2024, 13, 1]}),
    "date of floats": one({"t": "date", "v": [2024.0, 1, 1]}),
    "date giant": one({"t": "date", "v": [BIG, 1, 1]}),
    "datetime short": one({"t": "datetime", "v": [2024, 1, 1], "z": None}),
    "datetime zone": one({"t": "datetime", "v": [2024, 1, 1, 0, 0, 0, 0, 0], "z": "Europe/Berlin"}),
    "time zone offset": one({"t": "time", "v": [0, 0, 0, 0, 0], "z": [BIG, None]}),
    "timezone name": one({"t": "timezone", "z": [0, ["x"]]}),
    "decimal": one({"t": "decimal", "v": "1_000"}),
    "decimal backtracks": one({"t": "decimal", "v": "9" * 200_000 + "x"}),
    "fraction by zero": one({"t": "fraction", "v": ["0x1", "0x0"]}),
    "fraction giant": one({"t": "fraction", "v": ["f" * (1 << 20), "f" * (1 << 20)]}),
    "uuid": one({"t": "uuid", "v": "not hexadecimal"}),
    "path kind": one({"t": "path", "c": "Path", "v": "/"}),
    "path no text": one({"t": "path", "c": "PurePosixPath", "v": ["/"]}),
    "torch name": one({"t": "torch_name", "v": "load"}),
    "deque shorter": one({"t": "deque", "v": [1, 2], "m": 1}),
    "counter twice": one({"t": "counter", "v": [["a", 1], ["a", 2]]}),
    "namespace dunder": one({"t": "namespace", "v": [["__class__", 1]]}),
    "namedtuple renamed": one({"t": "namedtuple", "c": "a.B", "v": [["_0", 1], ["x y", 1]]}),
    "cache class": one({"t": "cache", "c": "Cache", "v": []}),
    "cache layer": one({"t": "cache", "c": "StaticCache", "v": [["CacheLayerMixin", []]]}),
    "cache attribute": one({"t": "cache", "c": "StaticCache", "v": [["StaticLayer", [["update", 1]]]]}),
    "cache attribute twice": one({"t": "cache", "c": "StaticCache", "v": [["StaticLayer", [["keys", None], ["keys", None]]]]}),
    "cache setting": one({"t": "cache", "c": "StaticCache", "v": [["StaticLayer", [["keys", "text"]]]]}),
    "caches": one({"t": "encoder_decoder_cache", "v": [{"t": "kv_cache", "v": []}, {"t": "list", "v": []}], "u": []}),
    "added token": one({"t": "added_token", "v": "x", "f": [True]}),
    "encoding no json": one({"t": "encoding", "s": 0}),
    "encoding lengths": one({"t": "encoding", "s": 0}, encoding(ids=[1, 2])),
    "encoding id": one({"t": "encoding", "s": 0}, encoding(ids=[-1])),
    "encoding offsets": one({"t": "encoding", "s": 0}, encoding(offsets=[[0]])),
    "encoding sequence": one({"t": "encoding", "s": 0}, encoding(sequence_ranges={"0": {"start": 0, "end": 99}})),
    "encoding extra": one({"t": "encoding", "s": 0}, encoding(more=[])),
    "encoding deep": one({"t": "encoding", "s": 0}, b"[" * 100_000),
    "batch encoding": one({"t": "batch_encoding", "v": [], "e": [{"t": "encoding", "s": 0}] * 2, "n": 1}, encoding()),
    "model output field": one({"t": "model_output", "c": "transformers.modeling_outputs.BaseModelOutput", "v": [["nope", 1]]}),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_an_archive_error(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArchiveError):
        read(LIES[name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "the lie made the reader allocate"


def test_a_class_that_the_archive_names_is_never_imported() -> None:
    for kind in ("object", "enum", "namedtuple", "model_output"):
        node = {"t": kind, "c": "antigravity.Surprise", "n": "x", "v": 1 if kind == "enum" else []}
        value = read(one(node))["x"]
        assert type(value).__module__.startswith("edif_mesh.results")
    import sys

    assert "antigravity" not in sys.modules
    model = "transformers.models.zamba.modeling_zamba"
    assert type(read(one({"t": "model_output", "c": f"{model}.Surprise", "v": []}))["x"]).__name__ == "Record"
    assert model not in sys.modules


def rich_archive() -> bytes:
    base = torch.arange(24.0).reshape(4, 6)
    flags = {1: torch.ones(3, dtype=torch.bool), "a": {2, (3, "x")}}
    values = {"t": [base, base[1:, ::2], base.to(torch.bfloat16)], "d": flags, "n": np.array(["ab", "c"]), "b": b"bytes",
              "s": base.to_sparse(), "p": torch.nn.Parameter(base), "k": torch.randn(9).topk(2), "f": float("nan")}  # fmt: skip
    return plan(values).to_bytes()


def archive_of_every_kind() -> bytes:
    return plan({kind: make() for kind, make in SAVED.items()}).to_bytes()


def test_every_truncation_is_an_archive_error() -> None:
    data = rich_archive()
    for length in range(0, len(data), 7):
        with pytest.raises(ArchiveError):
            read(data[:length])


@pytest.mark.parametrize("seed", range(4))
def test_damaged_archives_are_read_or_refused_and_nothing_else(seed: int) -> None:
    chance, original = random.Random(seed), rich_archive() if seed % 2 else archive_of_every_kind()
    tree_at, tree_bytes = parse_tail(original[-TAIL_BYTES:], len(original))
    told = [
        *range(HEAD_BYTES),
        *range(tree_at, tree_at + tree_bytes),
        *range(len(original) - TAIL_BYTES, len(original)),
    ]
    refused, count = 0, 400 if seed % 2 else 80
    for _ in range(count):
        data = bytearray(original)
        for _ in range(chance.randint(1, 4)):
            data[chance.choice(told)] = chance.choice([chance.randrange(256), *b'0123456789-[]{}",'])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = read(data)
                with contextlib.suppress(NotImplementedError):  # torch cannot show its own uint4
                    str(values)
        except ArchiveError:
            refused += 1
        along = RecordReader(lambda start, size, data=data: bytes(data[start : start + size]))
        with contextlib.suppress(ArchiveError):
            list(along.leaves(len(data)))
    assert refused > count // 4


def test_no_module_of_the_archive_imports_a_pickle() -> None:
    folder = Path(edif_mesh.results.__file__).parent
    checked = 0
    for path in [*folder.glob("archive*.py"), folder / "nnsight_types.py", folder / "export.py"]:
        names: set[str] = set()
        for part in ast.walk(ast.parse(path.read_text())):
            if isinstance(part, ast.Import):
                names |= {alias.name.split(".")[0] for alias in part.names}
            elif isinstance(part, ast.ImportFrom):
                names.add((part.module or "").split(".")[0])
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "torch":
                assert part.attr not in ("load", "save"), path.name
        assert not names & {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "copyreg"}, (
            path.name
        )
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize(
    "raw",
    [
        record_head(b"CODE", 8) + bytes(64),
        record_head(DATA, 1 << 60),
        record_head(b"LEAF", 64) + b"{" * 64,
        record_head(b"LEAF", 2 << 20) + bytes(2 << 20),
        record_head(b"LEAF", 50) + b'{"name":"a","node":1,"storages":[[1048576,64]]}   ' + bytes(14),
        record_head(b"LEAF", 38) + b'{"name":"a","node":1,"storages":[[0]]}' + bytes(26),
        bytes(64),
        record_head(DATA, 0)[:-1] + b"x",
    ],
)
def test_a_stream_of_lies_is_refused_by_who_reads_along(raw: bytes) -> None:
    data = HEAD + raw
    with pytest.raises(ArchiveError):
        list(RecordReader(lambda start, size: data[start : start + size]).leaves(len(data)))
