"""Of a lazy result only what is indexed is fetched, it equals torch's own answer, and a hostile tree is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.errors import ArchiveError, ResultError
from edif_mesh.results.archive import plan
from edif_mesh.results.archive_records import RECORD_BYTES, TAIL_BYTES, parse_tail, record_head, tail
from edif_mesh.results.lazy import LazyResult, LazyTensor, open_archive, open_result
from edif_mesh.results.lazy_tensor import no_waiting
from edif_mesh.results.transfer import ResultWriter
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import FileSink
from edif_mesh.transport.memory import MemoryBroker
from edif_mesh.wire import subjects
from tests.builders_transfer import a_manifest
from tests.same_values import assert_same
from tests.saved_values import SAVED

JOB = JobId("j0000000000000000000000a")
ONE = AttemptNumber(1)
CHUNK = 16 << 10
Open = Callable[..., Any]


class Stored:
    """A result at a broker in memory, in chunks of 16 KiB."""

    def __init__(self, folder: Path) -> None:
        self.broker, self.folder = MemoryBroker(), folder
        self.archive_bytes = 0

    async def put(self, values: dict[str, Any], **options: Any) -> None:
        await self.broker.durable().ensure(
            subjects.STREAMS, max_bytes={spec.name: 64 << 20 for spec in subjects.STREAMS}
        )
        data = plan(values, **options).to_bytes()
        writer = ResultWriter(self.broker.bulk(), JOB, ONE, chunk_bytes=CHUNK)
        await writer.feed(data)
        self.manifest = a_manifest(JOB, ONE, await writer.finish())
        self.archive_bytes = len(data)

    async def open(self) -> LazyResult:
        sink = FileSink(self.folder / "cached", or_nameless=True)
        return await open_result(ResultReader(self.broker.bulk(), JOB, sink), sink, self.manifest, no_waiting)


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path)


def opened(values: dict[str, Any], folder: Path, **options: Any) -> LazyResult:
    """The values as a mapped file."""
    path = folder / "x.edif"
    path.write_bytes(plan(values, **options).to_bytes())
    return open_archive(path)


async def test_shape_and_dtype_are_there_at_once_and_a_row_moves_its_chunks(stored: Stored) -> None:
    acts = torch.randn(8, 100, 1000)
    await stored.put({"acts": acts, "loss": torch.tensor(0.5), "why": "text"})
    with await stored.open() as result:
        lazy = result["acts"]
        assert (lazy.shape, lazy.dtype, lazy.ndim, len(lazy), lazy.nbytes) == (acts.shape, acts.dtype, 3, 8, 3_200_000)
        assert "(8, 100, 1000)" in repr(lazy)
        assert_same(result["loss"], torch.tensor(0.5))
        assert result["why"] == "text"
        assert result.fetched_bytes <= 5 * CHUNK
        before = result.fetched_bytes
        assert_same(await lazy.at(3, 7), acts[3, 7])
        assert result.fetched_bytes - before <= 2 * CHUNK + 1000
        before = result.fetched_bytes
        assert_same(await lazy.at(3, 7, slice(5, 9)), acts[3, 7, 5:9])
        assert result.fetched_bytes == before, "what is here is not fetched again"
        assert_same(await lazy.at(slice(None), -1), acts[:, -1])
        assert result.fetched_bytes - before <= 8 * (2 * CHUNK + 1000)
        assert_same(await lazy.at(...), acts)


async def test_what_has_come_is_there_for_a_later_process_and_two_do_not_disturb_each_other(stored: Stored) -> None:
    acts = torch.randn(50, 5000)
    await stored.put({"acts": acts})
    first = await stored.open()
    assert_same(await first["acts"].at(3), acts[3])
    second = await stored.open()  # while the first holds the file
    assert_same(await second["acts"].at(4), acts[4])
    assert_same(await first["acts"].at(40), acts[40])
    kept = await second["acts"].at(slice(0, 5))
    second.close()
    first.close()
    with pytest.raises(ResultError, match="open it again"):
        await first["acts"].at(20)
    assert_same(await first["acts"].at(40), acts[40])
    assert_same(kept, acts[:5])
    with await stored.open() as later:
        start = later.fetched_bytes
        assert_same(await later["acts"].at(3), acts[3])
        assert_same(await later["acts"].at(40), acts[40])
        assert later.fetched_bytes == start
    assert sorted(path.name for path in stored.folder.iterdir()) == ["cached.part", "cached.part.have"]


async def test_a_process_that_is_killed_leaves_what_it_has_fetched(stored: Stored) -> None:
    await stored.put({"acts": torch.randn(50, 5000)})
    result = await stored.open()
    await result["acts"].at(3)
    lines = (stored.folder / "cached.part.have").read_text().splitlines()
    assert len(lines) > 2, "the list is written as chunks come, not when the file is closed"
    result.close()


def test_a_second_writer_of_one_file_is_told_so(tmp_path: Path) -> None:
    first, second = FileSink(tmp_path / "x"), FileSink(tmp_path / "x")
    first.begin(JOB, ONE)
    with pytest.raises(ResultError, match="another process"):
        second.begin(JOB, ONE)
    first.close()
    second.begin(JOB, ONE)
    second.close()


async def test_indexing_in_asynchronous_code_says_what_to_write(stored: Stored) -> None:
    await stored.put({"acts": torch.randn(50, 5000)})
    with await stored.open() as result, pytest.raises(ResultError, match=r"\.at\("):
        result["acts"][3]


async def test_what_is_changed_in_place_does_not_reach_the_cache(stored: Stored) -> None:
    await stored.put({"small": torch.zeros(10), "acts": torch.ones(50, 5000)})
    with await stored.open() as result:
        result["small"].add_(7)
        (await result["acts"].at(0)).add_(7)
        assert_same(await result["acts"].at(0), torch.ones(5000))
    with await stored.open() as later:
        assert_same(later["small"], torch.zeros(10))


SHARED: dict[str, Callable[[torch.Tensor], dict[str, Any]]] = {
    "a parameter": lambda t: {"a": t, "b": torch.nn.Parameter(t)},
    "a conjugate": lambda t: {"a": t.cfloat(), "b": t.cfloat().conj()},
    "sparse values": lambda t: {"a": t.flatten(), "b": torch.sparse_coo_tensor(torch.arange(t.numel())[None], t.flatten(), check_invariants=False)},
    "views": lambda t: {"a": t, "b": t[3:, ::2].T, "c": [t.reshape(-1), {"d": t[1]}]},
    "the same twice": lambda t: {"a": t, "b": [t, t]},
}  # fmt: skip


@pytest.mark.parametrize("kind", SHARED)
async def test_values_over_the_same_bytes_have_them_all(stored: Stored, kind: str) -> None:
    values = SHARED[kind](torch.randn(100, 500))
    await stored.put(values)
    with await stored.open() as result:
        for name, wanted in values.items():
            found = result[name]
            if isinstance(found, list):
                continue
            found = await found.at(...) if isinstance(found, LazyTensor) else found
            assert_same(found, wanted)


@pytest.mark.parametrize("kind", SAVED)
async def test_every_kind_comes_back_as_it_was(stored: Stored, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edif_mesh.results.lazy_plan.LAZY_BYTES", 1)
    values = SAVED[kind]()
    path = stored.folder / "x.edif"
    path.write_bytes(plan(values).to_bytes())
    from edif_mesh.results.archive import read

    await stored.put(values)
    with await stored.open() as result:
        assert_same(await loaded(dict(result)), read(path))


async def loaded(value: Any) -> Any:
    """The same with every lazy tensor loaded, in containers that tests save."""
    if isinstance(value, LazyTensor):
        return await value.at(...)
    if type(value) in (dict, OrderedDict):
        return type(value)([(key, await loaded(part)) for key, part in value.items()])
    if type(value) is deque:
        return deque([await loaded(part) for part in value], value.maxlen)
    if type(value) in (list, tuple) or type(value).__module__ == "torch.return_types":
        return type(value)([await loaded(part) for part in value])
    return value


def test_a_transformers_cache_is_no_lazy_one(tmp_path: Path) -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    keys = torch.randn(1, 4, 100, 64)
    cache.update(keys, keys + 1, 0)
    with opened({"cache": cache, "acts": torch.randn(200, 500)}, tmp_path) as result:
        assert_same(result["cache"].layers[0].keys, keys)
        assert isinstance(result["acts"], LazyTensor)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_wire_dtypes_come_back_in_their_own(tmp_path: Path, dtype: str) -> None:
    acts = torch.randn(200, 1000)
    with opened({"acts": acts}, tmp_path, wire_dtype=dtype) as result:
        assert result["acts"].dtype is torch.float32
        assert result["acts"].nbytes == 800_000
        assert 0 < float((result["acts"][5] - acts[5]).abs().max()) < 0.05
        assert_same(result["acts"].mapped(), result["acts"].load())


def test_numpy_arrays_gradients_and_iteration(tmp_path: Path) -> None:
    acts = torch.randn(200, 500, requires_grad=True)
    with opened({"acts": acts, "half": acts.detach().bfloat16()}, tmp_path) as result:
        assert np.array_equal(np.asarray(result["acts"]), acts.detach().numpy())
        assert result["acts"][1].requires_grad
        assert result["half"].numpy().dtype == np.float32
        assert_same(list(result["half"])[7], acts.detach().bfloat16()[7])


def test_every_kind_becomes_numpy_or_is_no_tensor(tmp_path: Path) -> None:
    values = {kind.replace(" ", "_"): make() for kind, make in SAVED.items()}
    with opened({"all": values}, tmp_path) as result:
        for name, array in result.to_numpy().items():
            assert isinstance(array, np.ndarray | np.generic), name


def test_save_writes_tensors_and_the_rest_apart(tmp_path: Path) -> None:
    acts = torch.randn(3000, 1000)  # several pieces of the writer
    values = {"acts": acts, "turned": acts[:500].T, "n": 3, "deep": [{"x": torch.ones(2)}]}
    with opened(values, tmp_path, wire_dtype="") as result:
        assert result.save(tmp_path / "out") == ["n"]
    with safe_open(tmp_path / "out" / "tensors.safetensors", "pt") as file:
        assert set(file.keys()) == {"acts", "turned", "deep.0.x"}
        assert_same(file.get_tensor("acts"), acts)
        assert_same(file.get_tensor("turned"), acts[:500].T.contiguous())
    assert (tmp_path / "out" / "values.txt").read_text() == "n = 3\n"
    with opened({"n": 3}, tmp_path) as result:
        assert result.save(tmp_path / "none") == ["n"]


def test_no_more_than_pieces_are_in_memory_while_a_file_is_written(tmp_path: Path) -> None:
    rows = 30_000  # 120 MB as float32, 60 MB as they travel
    (tmp_path / "x.edif").write_bytes(plan({"acts": torch.ones(rows, 1000)}, wire_dtype="float16").to_bytes())
    script = (
        "import resource, sys; from pathlib import Path; from edif_mesh.results.lazy import open_archive\n"
        "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        "import threading, time; most = [0]; end = threading.Event(); before = peak()\n"
        "def look():\n    while not end.is_set(): most[0] = max(most[0], peak()); end.wait(0.002)\n"
        "t = threading.Thread(target=look); t.start()\n"
        "open_archive(Path(sys.argv[1])).to_safetensors(Path(sys.argv[2])); end.set(); t.join()\n"
        "print(most[0] - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.edif"), str(tmp_path / "o.safetensors")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 80_000, "KiB of memory of its own"
    assert (tmp_path / "o.safetensors").stat().st_size > rows * 4000


# -------------------------------------------------------------------------------------------------------- hostile trees


def with_tree(values: dict[str, Any], change: Callable[[dict[str, Any]], Any], path: Path) -> Path:
    """An archive with its tree changed."""
    data = plan(values).to_bytes()
    offset, size = parse_tail(data[-TAIL_BYTES:], len(data))
    tree = json.loads(data[offset : offset + size])
    change(tree)
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 64)
    body = data[: offset - RECORD_BYTES] + record_head(b"TREE", len(text)) + text
    path.write_bytes(body + tail(offset, len(text), len(body) + TAIL_BYTES))
    return path


def node_of(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree["values"][0][1]
    return found


def put(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: node_of(tree).update(copy.deepcopy(fields))


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "reaches beyond": put(shape=[1000, 1000]),
    "huge stride": put(stride=[1 << 40, 1]),
    "beyond any number": put(shape=[1 << 70, 1]),
    "negative shape": put(shape=[-1, 500]),
    "negative stride": put(stride=[-500, 1]),
    "offset": put(o=1 << 30),
    "repeats": put(shape=[1 << 20, 1 << 20], stride=[0, 0]),
    "no dtype": put(d="pickle"),
    "dtype of no name": put(d=["float32"]),
    "kind of no name": put(t=["tensor"]),
    "kind that is none": put(t={"t": "list"}),
    "no storage": put(s=99),
    "truth as storage": put(s=True),
    "text as storage": put(s="0"),
    "gradient of whole numbers": put(d="int32", g=True),
    "wire dtype": put(w="int4"),
    "int8 without scale": put(w="int8"),
    "dimensions": put(shape=[1] * 100, stride=[1] * 100),
    "storage over the tree": lambda tree: tree["storages"].__setitem__(0, [128, 1 << 40]),
    "storage at a crooked place": lambda tree: tree["storages"].__setitem__(0, [130, 64]),
    "two storages in one place": lambda tree: tree["storages"].append(list(tree["storages"][0])),
    "values are no list": lambda tree: tree.update(values={"acts": 1}),
    "value without a name": lambda tree: tree.update(values=[[1]]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_tree_is_refused_when_it_is_opened(kind: str, tmp_path: Path) -> None:
    path = with_tree({"acts": torch.randn(100, 500)}, HOSTILE[kind], tmp_path / "x")
    with pytest.raises(ArchiveError):
        open_archive(path)


def test_bytes_that_are_no_truths_are_refused_when_they_are_read(tmp_path: Path) -> None:
    path = with_tree({"acts": torch.full((100, 1000), 7, dtype=torch.uint8)}, put(d="bool"), tmp_path / "x")
    lazy = open_archive(path)["acts"]
    for read in (lambda: lazy[3], lazy.load, lazy.mapped):
        with pytest.raises(ArchiveError, match="neither 0 nor 1"):
            read()


@pytest.mark.parametrize("data", [b"", b"x", bytes(64), bytes(1000)])
def test_a_file_that_is_no_archive_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ArchiveError):
        open_archive(tmp_path / "x")
