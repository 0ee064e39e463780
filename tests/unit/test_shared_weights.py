"""Weights in shared memory, within one process: nothing is lost on the way there and back, and no change of them goes unseen."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nnsight.modeling.transformers import TransformersModel
from torch import nn

from edif_mesh.errors import ModelLoadError
from site_agent.hosting.checksum import Difference, WeightsChecksum
from site_agent.hosting.manifest import ALIGN_BYTES, Block, Manifest, Segment, bind, describe, lay_out
from site_agent.hosting.owner import SharedWeights
from site_agent.hosting.segments import SharedMemory, block_storages, words_of
from site_agent.hosting.stores import Stores
from site_agent.hosting.zygote import pass_activations_on
from tests import traces


class Odd(nn.Module):
    """Every way in which a model holds tensors, that was met in transformers or could be."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(120, dtype=torch.float32)
        self.embed = nn.Linear(3, 4, bias=False)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.strided = nn.Parameter(base.view(10, 12)[2:6, 1:9].t())  # not contiguous, in the middle of a storage
        self.overlapping = nn.Parameter(base.view(10, 12)[4:8], requires_grad=False)  # of the same storage
        self.low = nn.Parameter(torch.randn(5).to(torch.bfloat16))
        self.lower = nn.Parameter(torch.randn(8).to(torch.float8_e4m3fn), requires_grad=False)
        self.packed = nn.Parameter(torch.randint(-9, 9, (7,), dtype=torch.int32), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(3.5))
        self.none = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("kept", torch.tensor([True, False]))
        self.register_buffer("inv_freq", torch.rand(4), persistent=False)
        self.original_inv_freq = self.inv_freq  # rotary embeddings: a plain attribute that is the buffer
        self.plain = torch.rand(2, 2)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by name."""
        found = {**dict(self.named_parameters(remove_duplicate=False)), **dict(self.named_buffers())}
        return {**found, "original_inv_freq": self.original_inv_freq, "plain": self.plain}


class Wrapped:
    """What the owner gets from nnsight, as far as it looks."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module


def exact(tensor: torch.Tensor) -> bytes:
    """The numbers, to the bit."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def on_meta() -> Odd:
    """The structure without weights, as the fork server has it."""
    module = Odd().to("meta")
    module.head.weight = module.embed.weight
    module.original_inv_freq = module.inv_freq
    module.plain = module.plain.to("meta")
    return module


def test_another_process_of_the_same_structure_gets_every_tensor_to_the_bit() -> None:
    loaded = Odd()
    before = {name: (exact(t), t.dtype, t.shape, t.stride(), t.requires_grad) for name, t in loaded.tensors().items()}
    shared = SharedWeights(Wrapped(loaded), "shared_memory")
    other, stores = on_meta(), Stores("shared_memory")
    manifest = Manifest.from_json(shared.manifest.to_json())
    bind(other, manifest, block_storages(manifest, [stores.attach(*published) for published in shared.published]))
    for module in (loaded, other):
        after = {
            name: (exact(t), t.dtype, t.shape, t.stride(), t.requires_grad) for name, t in module.tensors().items()
        }
        assert after == before
        assert module.head.weight is module.embed.weight
        assert module.original_inv_freq is module.inv_freq
        assert "inv_freq" not in module.state_dict()
        with torch.no_grad():
            module.strided[0, 2] = 777  # row 4, column 1 of what the two parameters share
        assert module.overlapping[0, 1] == 777


def test_what_one_process_writes_no_other_sees() -> None:
    shared = SharedWeights(Wrapped(Odd()), "shared_memory")
    stores = Stores("shared_memory")
    one, other = ([stores.attach(*published) for published in shared.published] for _ in range(2))
    before = words_of(other[0]).clone()
    words_of(one[0]).fill_(7)
    assert torch.equal(words_of(other[0]), before)
    assert shared.check() == {"checked": True, "changed": ""}


def test_a_published_file_in_memory_cannot_be_written_again_by_anybody() -> None:
    store = SharedMemory()
    store.create(Segment("cpu", 100))
    [(handle, descriptor)] = store.publish()
    with pytest.raises(ModelLoadError, match="could not be mapped: Operation not permitted"):
        SharedMemory(writable=True).attach(handle, descriptor)


def test_memory_that_others_can_write_is_checked_and_the_alarm_names_the_tensor() -> None:
    shared = SharedWeights(Wrapped(Odd()), "shared_memory_writable")
    assert shared.check()["changed"] == ""
    [mapped] = [Stores("shared_memory_writable").attach(*published) for published in shared.published]
    placed = next(placed for placed in shared.manifest.tensors if placed.names == ("low",))
    words_of(mapped)[shared.manifest.blocks[placed.block].offset // 4] ^= 1
    assert "low" in shared.check()["changed"]


def test_a_model_of_several_segments_comes_back_whole() -> None:
    module = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)))
    before = [exact(p) for p in module.parameters()]
    manifest, taken = describe(module, most_bytes=8192)
    assert len(manifest.segments) > 2
    assert all(segment.size_bytes <= 8192 for segment in manifest.segments)
    store = SharedMemory()
    mapped = [store.create(segment) for segment in manifest.segments]
    for number, block in enumerate(manifest.blocks):
        flat = torch.empty(0, dtype=torch.uint8).set_(
            block_storages(manifest, mapped)(number), 0, (block.size_bytes,), (1,)
        )
        flat.copy_(torch.frombuffer(bytearray(exact(taken[number][0].tensor)), dtype=torch.uint8))
    bind(module, manifest, block_storages(manifest, mapped))
    assert [exact(p) for p in module.parameters()] == before


def test_blocks_are_aligned_and_never_overlap() -> None:
    draw = random.Random(5)
    sizes = [(draw.choice(["cuda:0", "cuda:1"]), draw.randint(1, 3000)) for _ in range(200)]
    segments, blocks = lay_out(sizes, most_bytes=10_000)
    taken: dict[int, int] = {}
    for (device, size), block in zip(sizes, blocks, strict=True):
        assert segments[block.segment].device == device
        assert block.size_bytes == size
        assert block.offset % ALIGN_BYTES == 0
        assert block.offset >= taken.get(block.segment, 0)
        taken[block.segment] = block.offset + size
    assert [taken[number] for number in range(len(segments))] == [segment.size_bytes for segment in segments]
    assert lay_out([("cpu", 50_000)], most_bytes=10_000) == ([Segment("cpu", 50_000)], [Block(0, 0, 50_000)])


def test_what_cannot_be_shared_is_refused_by_name() -> None:
    class Packed(nn.Parameter):
        pass

    offloaded, quantized, sparse = nn.Linear(2, 2), nn.Linear(2, 2), nn.Module()
    offloaded.weight = nn.Parameter(torch.empty(2, 2, device="meta"))
    quantized.weight = Packed(torch.ones(2, 2))
    sparse.register_buffer("few", torch.eye(2).to_sparse())
    for module, words in (
        (offloaded, "weight .* offloads"),
        (quantized, "weight is a Packed"),
        (sparse, "few is a Tensor"),
    ):
        with pytest.raises(ModelLoadError, match=words):
            describe(module)


def test_a_tensor_that_was_not_shared_is_noticed_before_any_job_runs() -> None:
    manifest, _ = describe(nn.Linear(2, 2))
    bigger = nn.Linear(2, 2).to("meta")
    bigger.register_buffer("extra", torch.empty(1, device="meta"))
    store = SharedMemory()
    mapped = [store.create(segment) for segment in manifest.segments]
    with pytest.raises(ModelLoadError, match="extra"):
        bind(bigger, manifest, block_storages(manifest, mapped))


# ----------------------------------------------------------------------------------------------------- weights check


def weights(count: int = 1000) -> torch.Tensor:
    """Words as a model has them: many alike, many zero."""
    generator = torch.Generator().manual_seed(4)
    return torch.randint(-3, 3, (count,), dtype=torch.int32, generator=generator)


@pytest.fixture(scope="module")
def checksum() -> WeightsChecksum:
    return WeightsChecksum(piece_words=64)


def changed(checksum: WeightsChecksum, before: torch.Tensor, after: torch.Tensor) -> Difference | None:
    return checksum.first_difference([checksum.of(before)], [checksum.of(after)])


def test_every_single_bit_of_a_word_counts_wherever_it_is(checksum: WeightsChecksum) -> None:
    before = weights()
    for place in (0, 63, 64, 500, 999):
        for bit in range(32):
            after = before.clone()
            after[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
            found = changed(checksum, before, after)
            assert found == Difference(0, place // 64 * 256, (place // 64 + 1) * 256), (place, bit)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.flip(0),
        lambda w: w.roll(1),
        lambda w: torch.cat([w[64:128], w[:64], w[128:]]),  # two pieces change places
        lambda w: torch.cat([w[1:2], w[:1], w[2:]]),
        lambda w: w.clone().index_put_((torch.tensor([3, 9]),), w[torch.tensor([3, 9])] ^ torch.tensor(-(2**31), dtype=torch.int32)),
        lambda w: w * -1,
        lambda w: torch.zeros_like(w),
    ],
)  # fmt: skip
def test_words_that_change_places_or_signs_are_noticed(checksum: WeightsChecksum, change: Any) -> None:
    assert changed(checksum, weights(), change(weights())) is not None


def test_equal_weights_give_equal_sums_and_another_owner_other_ones(checksum: WeightsChecksum) -> None:
    assert changed(checksum, weights(), weights()) is None
    assert WeightsChecksum(piece_words=64).of(weights()) != checksum.of(weights())


# -------------------------------------------------------------------------------------------------- over several devices


def test_a_mapped_model_passes_activations_on_as_one_that_was_loaded_over_devices() -> None:
    """Two parts on one CPU: the hooks of accelerate around mapped weights, and nnsight around those."""
    loaded, mapped = traces.loaded_tiny_model(), traces.loaded_tiny_model()
    shared, stores = SharedWeights(loaded, "shared_memory"), Stores("shared_memory")
    module = mapped._module.to("meta")
    bind(module, shared.manifest, block_storages(shared.manifest, [stores.attach(*item) for item in shared.published]))
    pass_activations_on(mapped, {"transformer": "cpu", "lm_head": "cpu"})
    logits = []
    for model in (loaded, mapped):
        with model.trace("Hello world"):
            hidden = model.transformer.h[0].output
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            hidden[:] = hidden * 2
            changed = model.lm_head.output.save()
        logits.append(changed.detach())
    assert hasattr(module.transformer.h[0].attn.c_attn, "_hf_hook")
    assert torch.equal(*logits)
    assert module.lm_head.weight is module.transformer.wte.weight


# ------------------------------------------------------------------------------------------------ families of models

SMALL = dict(
    vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Mixtral", {"num_local_experts": 4}),
        ("Gemma2", {"head_dim": 16}),
        ("Phi3", {}),
    ],
)  # fmt: skip
def test_a_model_of_another_family_computes_and_generates_as_it_was_loaded(
    family: str, more: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **more)
    getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(tmp_path)
    traces.tiny_model().tokenizer.save_pretrained(tmp_path)
    loaded, structure = (
        TransformersModel(str(tmp_path), task="text-generation", dispatch=True, **where)
        for where in ({"device": "cpu"}, {"device": "meta", "device_map": "meta"})
    )
    ids = torch.tensor([[5, 6, 7, 8]])

    def outcome(module: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [module.eval()(ids).logits, module.generate(ids, max_new_tokens=4, do_sample=False)]

    before = outcome(loaded._module)
    shared, stores = SharedWeights(loaded, "shared_memory"), Stores("shared_memory")
    mapped = [stores.attach(*item) for item in shared.published]
    bind(structure._module, shared.manifest, block_storages(shared.manifest, mapped))
    for after in (outcome(structure._module), outcome(loaded._module)):
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
