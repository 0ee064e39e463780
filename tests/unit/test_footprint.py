"""The size of a model is reckoned from its checkpoint: dtype by dtype, shard by shard, a tied weight once."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from edif_mesh.models import resolve_model
from site_agent.hosting.footprint import checkpoint_quantization, estimate_weights_bytes, held_dtype
from tests import models

WIDTHS = {"F32": 4, "BF16": 2, "I64": 8, "U8": 1}


def a_checkpoint(folder: Path, files: dict[str, dict[str, tuple[str, list[int]]]], **config: object) -> Path:
    """Safetensors files with the headers of `{file: {tensor: (kind, shape)}}`, without the weights themselves."""
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        header, at = {}, 0
        for tensor, (kind, shape) in tensors.items():
            size = WIDTHS[kind]
            for length in shape:
                size *= length
            header[tensor] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        raw = json.dumps(header).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(raw)) + raw)
    return folder


LAYER = {"layer.weight": ("F32", [100, 10]), "layer.bias": ("F32", [10]), "steps": ("I64", [3])}


def test_weights_count_in_the_dtype_in_which_they_will_be_held(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, {"model.safetensors": LAYER}, torch_dtype="float32")
    assert estimate_weights_bytes(folder) == 1010 * 4 + 24
    assert estimate_weights_bytes(folder, "bfloat16") == 1010 * 2 + 24
    assert held_dtype(folder) == "float32"


def test_the_dtype_of_the_configuration_decides_where_the_settings_leave_it_to_the_model(tmp_path: Path) -> None:
    folder = a_checkpoint(tmp_path, {"model.safetensors": LAYER}, text_config={"dtype": "bfloat16"})
    assert estimate_weights_bytes(folder) == 1010 * 2 + 24


def test_a_tied_head_that_is_stored_once_more_counts_once(tmp_path: Path) -> None:
    shared = {"model.embed_tokens.weight": ("BF16", [50, 8]), "lm_head.weight": ("BF16", [50, 8])}
    folder = a_checkpoint(tmp_path, {"model.safetensors": shared}, tie_word_embeddings=True)
    assert estimate_weights_bytes(folder) == 50 * 8 * 2
    a_checkpoint(tmp_path, {"model.safetensors": shared}, tie_word_embeddings=False)
    assert estimate_weights_bytes(folder) == 2 * 50 * 8 * 2


def test_the_shards_of_the_index_count_and_nothing_else_in_the_folder(tmp_path: Path) -> None:
    parts = {f"model-{n}-of-2.safetensors": {f"l{n}": ("BF16", [10])} for n in (1, 2)}
    folder = a_checkpoint(tmp_path, {**parts, "consolidated.safetensors": {"all": ("BF16", [20])}})
    index = {"weight_map": {f"l{n}": f"model-{n}-of-2.safetensors" for n in (1, 2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert estimate_weights_bytes(folder) == 40


def test_a_quantized_linear_shrinks_and_what_the_format_leaves_alone_does_not(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": ("F32", [1000, 64]),
        "model.layers.0.q_proj.weight": ("F32", [64, 64]),
        "model.layers.0.norm.weight": ("F32", [64]),
    }
    folder = a_checkpoint(tmp_path, {"model.safetensors": tensors})
    left_alone = (64_000 + 64) * 2
    assert estimate_weights_bytes(folder, quantization="nf4") == left_alone + 4096 // 2 + 4096 // 64 * 4
    assert estimate_weights_bytes(folder, quantization="int8") == left_alone + 4096
    assert held_dtype(folder, "auto", "nf4") == "bfloat16"
    assert held_dtype(folder, "auto", "int8") == "float16"


def test_a_checkpoint_that_is_quantized_already_counts_as_it_is_stored(tmp_path: Path) -> None:
    said = {"quant_method": "gptq", "bits": 4}
    folder = a_checkpoint(
        tmp_path, {"model.safetensors": {"q": ("U8", [10, 10]), "s": ("F32", [10])}}, quantization_config=said
    )
    assert estimate_weights_bytes(folder, "bfloat16") == 140
    assert checkpoint_quantization(folder) == "gptq-4bit"


@pytest.mark.parametrize(("name", "expected"), [("pytorch_model.bin", 500), ("model-q4.gguf", 1000)])
def test_other_files_count_by_their_size(tmp_path: Path, name: str, expected: int) -> None:
    (tmp_path / "config.json").write_text('{"torch_dtype": "float32"}')
    (tmp_path / name).write_bytes(bytes(1000))
    (tmp_path / "training_args.bin").write_bytes(bytes(7))
    assert estimate_weights_bytes(tmp_path, "bfloat16") == expected


def test_a_folder_without_weights_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert estimate_weights_bytes(tmp_path) == 0


def test_the_estimate_of_a_real_checkpoint_is_exact() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = resolve_model(models.tiny_gpt2(), cache=models.cache()).path
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert estimate_weights_bytes(folder, "bfloat16") == sum(p.numel() * 2 for p in loaded.parameters())
