"""Values survive the archive exactly: type, numbers, sharing. And what cannot leave is refused by its name."""

from __future__ import annotations

import dataclasses
import enum
import fractions
import math
import random
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch

from edif_mesh.errors import ArchiveError, UnsupportedValueError
from edif_mesh.results import archive_decode, archive_encode
from edif_mesh.results.archive import Cut, leaf_value, plan, plan_rest, read
from edif_mesh.results.archive_encode import Check
from edif_mesh.results.archive_records import DATA, LEAF, RecordReader, leaf_text
from edif_mesh.results.archive_sent import Sent, fingerprint
from edif_mesh.results.archive_types import DTYPES, MAX_KEY_NODES, Record
from tests.same_values import assert_same, assert_same_strides
from tests.saved_values import REFUSED, SAVED

Pair = namedtuple("Pair", "left right")


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Probe:
    weight: torch.Tensor
    layer: int


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Level(enum.StrEnum):
    HIGH = "high"


class Settings(pydantic.BaseModel):
    rate: float


Renamed = namedtuple("Renamed", "a def", rename=True)


class Slots:
    __slots__ = ("__hidden", "shown")

    def __init__(self, number: int) -> None:
        self.__hidden, self.shown = number, number + 1


@dataclasses.dataclass(frozen=True)
class Measured:
    value: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", [self.value])


class Plain:
    def __init__(self) -> None:
        self.score = 3.5


def through(value: Any, **options: Any) -> Any:
    return read(plan({"x": value}).to_bytes(), **options)["x"]


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -7, 2**53, -(2**200), 1.5, -0.0, math.inf, -math.inf, math.nan, 1 + 2j, complex(math.nan, -0.0),
        "", "Straße \U0001f600", "\ud800 lone", "\x00", b"", b"\x00\xff" * 40, bytearray(b"abc"), ..., slice(1, None, -2),
        slice("a", (1, 2)), range(3, 99, 7), torch.Size([2, 3]), torch.bfloat16, torch.device("cuda:1"), [], (), {}, set(),
        frozenset({1, "a", (2, None)}), {1: "int", "1": "str", None: 0, (1, ("a",)): 2, 1.5: 3, b"k": 4},
        OrderedDict([("b", 1), ("a", 2)]), defaultdict(list, a=[1]), [[[[(1, [2])]]]],
    ],
    ids=lambda v: f"{type(v).__name__}-{str(v)[:12].encode('ascii', 'replace').decode()}",
)  # fmt: skip
def test_a_plain_value_comes_back_as_it_was(value: Any) -> None:
    assert_same(through(value), value)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_keeps_its_bits(name: str) -> None:
    raw = torch.arange(256, dtype=torch.uint8) % 2 if name == "bool" else torch.arange(256, dtype=torch.uint8)
    tensor = raw.view(DTYPES[name])
    assert_same(through(tensor), tensor)
    assert_same(through(tensor[3]), tensor[3])
    assert_same(through(tensor[:0].reshape(0, 4)), tensor[:0].reshape(0, 4))


def test_views_of_any_stride_keep_their_numbers_and_shape() -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = [base.mT, base[:, 1:3, ::2], base.permute(2, 0, 1)[1], base[0, 0, :1].expand(7, 9, 1), base.flip(0)]
    for view in views:
        assert_same(through(view), view)


def test_a_slice_ships_only_itself() -> None:
    logits = torch.randn(1, 9, 50_000)
    assert plan({"last": logits[0, -1]}).total_bytes < 50_000 * 4 + 1000
    assert plan({"column": logits[0, :, 0]}).total_bytes < 1000


def test_views_that_cover_their_storage_share_it_again_after_reading() -> None:
    base = torch.randn(100, 100)
    result = plan({"whole": base, "row": base[3], "turned": {"deep": [base.T]}})
    assert result.total_bytes < 100 * 100 * 4 + 1500
    back = read(result.to_bytes())
    back["whole"][3, 5] = 77.0
    assert back["row"][5] == 77.0
    assert back["turned"]["deep"][0][5, 3] == 77.0


def test_the_same_object_twice_stays_one_object() -> None:
    inner, tensor = [1], torch.ones(2)
    back = read(plan({"a": [inner, inner, tensor], "b": {"t": tensor, "i": inner}}).to_bytes())
    assert back["a"][0] is back["a"][1] is back["b"]["i"]
    assert back["a"][2] is back["b"]["t"]


def test_gradient_flags_and_parameters_come_back_without_a_graph() -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    back = read(
        plan(
            {"p": weight, "frozen": torch.nn.Parameter(torch.ones(1), requires_grad=False), "y": weight * 2}
        ).to_bytes()
    )
    assert type(back["p"]) is torch.nn.Parameter
    assert back["p"].requires_grad
    assert type(back["frozen"]) is torch.nn.Parameter
    assert not back["frozen"].requires_grad
    assert back["y"].requires_grad
    assert back["y"].is_leaf
    assert torch.equal(back["y"], weight * 2)


@pytest.mark.parametrize("kind", SAVED)
def test_every_kind_comes_back_as_it_was(kind: str) -> None:
    values = SAVED[kind]()
    assert_same(read(plan(values).to_bytes()), values)


def test_strides_are_kept_where_a_view_has_no_gaps() -> None:
    values = SAVED["tensors of every dtype and stride"]()
    back = read(plan(values).to_bytes())
    for name, value in values.items():
        assert_same_strides(back[name], value)


def test_the_guide_lists_exactly_these_kinds() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "researcher.md").read_text()
    _, _, section = guide.partition("## What can be saved")
    saved, _, refused = section.partition("\n## ")[0].partition("| refused |")
    assert _first_column(saved) == ["you save", *SAVED, *OWN_CLASSES]
    assert _first_column(refused) == list(REFUSED)
    for kind, (_, _, way) in REFUSED.items():
        assert way.strip("(") in refused.partition(f"| {kind} |")[2].partition("\n")[0], kind


OWN_CLASSES = ["an object of a class of your own", "`tracer.cache()`"]


def _first_column(text: str) -> list[str]:
    cells = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    return [cell for cell in cells if cell.strip("-")]


def test_torch_return_types_stay_what_torch_gave() -> None:
    top = torch.randn(9).topk(3)
    back = through(top)
    assert type(back) is type(top)
    assert torch.equal(back.indices, top.indices)


def test_transformers_values() -> None:
    from transformers import BatchEncoding, DynamicCache
    from transformers.generation.utils import GenerateDecoderOnlyOutput
    from transformers.modeling_outputs import CausalLMOutputWithPast

    cache = DynamicCache()
    cache.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    output = through(
        CausalLMOutputWithPast(logits=torch.ones(2), past_key_values=cache, hidden_states=(torch.zeros(1),))
    )
    assert type(output) is CausalLMOutputWithPast
    assert torch.equal(output.logits, torch.ones(2))
    assert output.loss is None
    assert type(output.past_key_values) is DynamicCache
    assert torch.equal(output.past_key_values.layers[0].keys, cache.layers[0].keys)
    assert output.past_key_values.get_seq_length() == 3
    assert type(through(GenerateDecoderOnlyOutput(sequences=torch.ones(1)))) is GenerateDecoderOnlyOutput
    batch = through(BatchEncoding({"input_ids": torch.tensor([1])}))
    assert type(batch) is BatchEncoding
    assert batch["input_ids"].tolist() == [1]


def test_an_output_class_of_one_model_is_real_where_that_model_is_loaded() -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2DoubleHeadsModelOutput

    value = GPT2DoubleHeadsModelOutput(logits=torch.ones(2), mc_logits=torch.zeros(1))
    assert_same(through(value), value)


def test_a_class_of_the_users_own_is_a_record_until_the_reader_names_it() -> None:
    values = {"probe": Probe(torch.ones(2), 3), "pair": Pair(1, [2]), "colour": {Colour.RED: 1}, "plain": Plain()}
    data = plan(values).to_bytes()
    back = read(data)
    assert isinstance(back["probe"], Record)
    assert back["probe"].layer == 3
    assert back["probe"].type_name == f"{__name__}.Probe"
    assert back["pair"] == (1, [2])
    assert back["pair"].right == [2]
    assert next(iter(back["colour"])).value == "red"
    named = read(data, classes={f"{__name__}.{c.__name__}": c for c in (Probe, Pair, Colour, Plain)})
    assert type(named["probe"]) is Probe
    assert type(named["pair"]) is Pair
    assert named["colour"] == {Colour.RED: 1}
    assert type(named["plain"]) is Plain
    assert named["plain"].score == 3.5


def test_everything_that_an_object_is_comes_back_or_is_refused() -> None:
    values = {"slots": Slots(1), "data": Measured(2), "member": Access.READ | Access.WRITE, "level": Level.HIGH,
              "fields": Renamed(1, 2), "model": Settings(rate=0.5)}  # fmt: skip
    data = plan(values).to_bytes()
    back = read(data)
    assert (back["slots"]._Slots__hidden, back["slots"].shown) == (1, 2)
    assert (back["data"].value, back["data"].seen) == (2, [2]), "an attribute that is no field"
    assert (back["member"].value, back["level"].value, back["model"].rate) == (3, "high", 0.5)
    assert tuple(back["fields"]._fields) == ("a", "_1")
    named = read(
        data, classes={f"{__name__}.{c.__name__}": c for c in (Slots, Measured, Access, Level, Renamed, Settings)}
    )
    assert type(named["slots"]) is Slots
    assert (type(named["data"]), named["data"].seen) == (Measured, [2])
    assert named["member"] is Access.READ | Access.WRITE
    assert named["level"] is Level.HIGH
    assert type(named["fields"]) is Renamed
    assert named["model"] == Settings(rate=0.5)


def test_a_subclass_of_a_container_comes_back_as_the_container() -> None:
    class Acts(OrderedDict):  # type: ignore[type-arg]
        pass

    assert_same(through([Acts(a=1), type("Rows", (list,), {})([1])]), [OrderedDict(a=1), [1]])


def test_bytes_that_were_viewed_as_bool_are_truths() -> None:
    assert through(torch.tensor([0, 1, 7], dtype=torch.uint8).view(torch.bool)).tolist() == [False, True, True]
    assert through(np.array([0, 1, 7], np.uint8).view(bool)).tolist() == [False, True, True]


@pytest.mark.parametrize(
    "value",
    [
        {"key": {tuple(range(MAX_KEY_NODES)): 1}},
        {"far": range(0, 2**70)},
        {"random": random.Random(1)},
        {"state": np.random.default_rng(1)},
        {"pattern": np.array(["a"], dtype=np.dtypes.StringDType())},
        {"offset": fractions.Fraction(1, 3**60_000)},
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_a_reader_would_not_take_is_refused_by_the_writer(value: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedValueError) as refused:
        plan(value)
    assert refused.value.path.startswith(next(iter(value)))


@pytest.mark.parametrize("kind", SAVED)
def test_writer_and_reader_count_parts_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, parts = SAVED[kind](), 1
    while True:
        monkeypatch.setattr(archive_encode, "MAX_NODES", parts)
        try:
            data = plan(values).to_bytes()
        except UnsupportedValueError:
            parts += 1
            continue
        break
    monkeypatch.setattr(archive_decode, "MAX_NODES", parts)
    read(data)
    monkeypatch.setattr(archive_decode, "MAX_NODES", parts - 1)
    with pytest.raises(ArchiveError, match="too large"):
        read(data)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_leave_is_refused_by_name_with_a_way_out(kind: str) -> None:
    make, name, way = REFUSED[kind]
    for look in (plan, lambda values: Check(1000).look(values, "")):
        with pytest.raises(UnsupportedValueError) as refused:
            look({"acts": [0, {"f": make()}]})
        inside = "[0]" if kind == "value that contains itself" else ""
        assert str(refused.value).partition("acts")[2].startswith(("[1]['f']" + inside, "'][1]['f']" + inside))
        assert (refused.value.type_name, way in refused.value.hint) == (name, True), refused.value


def test_nesting_is_bounded_alike_on_both_sides() -> None:
    deep: list[Any] = []
    for _ in range(94):
        deep = [deep]
    assert_same(through(deep), deep)
    for _ in range(4):
        deep = [deep]
    with pytest.raises(UnsupportedValueError, match="deeper"):
        plan({"deep": deep})


def test_the_buffers_are_views_of_the_tensors_memory_and_sum_to_the_total() -> None:
    tensor = torch.zeros(1000)
    result = plan({"t": tensor, "u": torch.ones(3)})
    assert sum(len(b) for b in result.buffers()) == result.total_bytes
    tensor[0] = 5.0
    assert read(result.to_bytes())["t"][0] == 5.0


@pytest.mark.parametrize("step", [64, 1000, 1 << 20])
def test_who_reads_along_gets_each_value_once_and_only_when_it_is_complete(step: int) -> None:
    sent, out = Sent(), bytearray()
    saved = {"first": torch.randn(300), "second": torch.arange(5)}
    ends: dict[str, int] = {}

    def put(parts: Iterable[Any]) -> None:
        for part in parts:
            out.extend(b"" if isinstance(part, Cut) else part)

    put(sent.begin())
    for name, value in saved.items():
        data = memoryview(value.numpy()).cast("B")
        offset, record = sent.record(DATA, [data])
        sent.add(data, offset, fingerprint(data))
        put(record)
        node = {"t": "tensor", "d": str(value.dtype)[6:], "shape": [len(value)], "stride": [1], "o": 0, "s": 0}
        put(sent.record(LEAF, [leaf_text(name, node, [(offset, len(data))])])[1])
        ends[name] = len(out)
    put(plan_rest({**saved, "late": [1, torch.ones(3)]}, sent).parts)
    assert_same(read(out), {**saved, "late": [1, torch.ones(3)]})

    reader = RecordReader(lambda start, size: bytes(out[start : start + size]))
    seen: dict[str, int] = {}
    for available in [*range(0, len(out), step), len(out)]:
        for leaf in reader.leaves(available):
            assert leaf.name not in seen
            seen[leaf.name] = available
            assert_same(leaf_value(leaf, [bytes(out[at : at + size]) for at, size in leaf.storages]), saved[leaf.name])
    assert list(seen) == list(saved)
    assert all(seen[name] - step < ends[name] <= seen[name] for name in saved)


def test_what_was_sent_before_is_named_and_not_sent_again() -> None:
    kept, changed = torch.arange(100.0), torch.arange(200.0)
    whole = plan({"kept": kept, "changed": changed}).total_bytes
    sent = Sent()
    parts = list(sent.begin())
    for value in (kept, changed):
        data = memoryview(value.numpy()).cast("B")
        offset, record = sent.record(DATA, [data])
        sent.add(data, offset, fingerprint(data))
        parts += record
    before = b"".join(bytes(part) for part in parts if not isinstance(part, Cut))
    changed.numpy()[0] = 7  # torch does not hear of it
    rest = plan_rest({"kept": kept, "changed": changed}, sent)
    data = before + rest.to_bytes()
    assert len(data) == rest.total_bytes
    assert_same(read(data), {"kept": kept, "changed": changed})
    assert len(rest.to_bytes()) < whole


def test_a_file_is_mapped_and_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_bytes(plan({"t": torch.zeros(1000)}).to_bytes())
    before = path.read_bytes()
    back = read(path)
    back["t"][0] = 9.0
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [8, 100, 4096, 100_000])
def test_a_changed_place_has_another_fingerprint(size: int) -> None:
    values = torch.randn(size)
    data = memoryview(values.numpy()).cast("B")
    before = fingerprint(data)
    assert fingerprint(memoryview(bytes(data))) == before
    for change in (lambda: values.mul_(1.5), lambda: values[3:4].zero_(), lambda: values.numpy().sort(),
                   lambda: values.copy_(values.flip(0)), lambda: values.data.roll(1), lambda: values.numpy().fill(0)):  # fmt: skip
        old, kept = fingerprint(data), values.clone()
        change()
        assert (fingerprint(data) == old) == torch.equal(values, kept)
