"""Small real models in a Hugging Face cache, built once and kept under `.models/` (ignored by git).

Layout of a cache: `models--ORG--NAME/{refs/main, snapshots/COMMIT/...}`; hub ids then resolve offline.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / ".models" / "hub"
TINY = "edif-test/tiny-gpt2"
GPT2 = "openai-community/gpt2"
DEEP = "edif-test/deep-gpt2"
ADAPTER = "edif-test/lora"


def cache() -> Path:
    """The Hugging Face cache that all test models share."""
    ROOT.mkdir(parents=True, exist_ok=True)
    return ROOT


def tiny_gpt2() -> str:
    """A random GPT-2 of 2 layers, 64 wide, with a tokenizer trained here; returns its hub id."""
    return _once(TINY, lambda folder: _gpt2(folder, layers=2, width=64, heads=4, vocabulary=512, seed=1))


def another_tiny(name: str) -> str:
    """One more model of the tiny one's shape under an id of its own, `edif-test/NAME`; returns its hub id."""
    return _once(f"edif-test/{name}", lambda folder: _gpt2(folder, layers=2, width=64, heads=4, vocabulary=512, seed=4))


def deep_gpt2() -> str:
    """A random GPT-2 of 48 small layers; returns its hub id."""
    return _once(DEEP, lambda folder: _gpt2(folder, layers=48, width=64, heads=4, vocabulary=512, seed=2))


def gpt2_shape() -> str:
    """The 124 M shape of GPT-2 (768 wide, 12 layers, 50257 tokens) with seeded random weights; returns its hub id."""
    return _once(GPT2, lambda folder: _gpt2(folder, layers=12, width=768, heads=12, vocabulary=50257, seed=3))


def lora_adapter() -> Path:
    """A LoRA adapter of the tiny model with seeded random weights, under its hub id in the cache; returns its folder."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = cache() / f"models--{ADAPTER.replace('/', '--')}"
    if not (base / "refs" / "main").exists():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(snapshot(tiny_gpt2()))
        lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False))
        lora.save_pretrained(base / "snapshots" / ("a" * 40))
        for path in (base / "snapshots").rglob("*.safetensors"):
            path.chmod(0o644)  # it is written for its owner only, and runners are other users
        (base / "refs").mkdir()
        (base / "refs" / "main").write_text("a" * 40)
    return snapshot(ADAPTER)


def snapshot(repo_id: str) -> Path:
    """The folder of a model in the cache."""
    return next((cache() / f"models--{repo_id.replace('/', '--')}" / "snapshots").iterdir())


def _once(repo_id: str, build: Callable[[Path], None]) -> str:
    commit = hashlib.sha1(repo_id.encode()).hexdigest()
    base = cache() / f"models--{repo_id.replace('/', '--')}"
    if not (base / "refs" / "main").exists():
        fresh = cache() / f".{os.getpid()}-{commit[:8]}"
        build(fresh / "snapshots" / commit)
        (fresh / "refs").mkdir(parents=True)
        (fresh / "refs" / "main").write_text(commit)
        try:
            fresh.rename(base)
        except OSError:  # another test process was faster
            shutil.rmtree(fresh)
    return repo_id


def _gpt2(folder: Path, *, layers: int, width: int, heads: int, vocabulary: int, seed: int) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(
        ["The Eiffel Tower is in the city of Paris", "hello world, a small tokenizer"], trainer
    )
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, n_positions=512)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(folder)
