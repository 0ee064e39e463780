"""Activation patching of a factual recall, as a researcher writes it: plain nnsight, run with `remote=True` or locally.

Two prompts differ in their subject only. The residual stream of the clean run is patched into the corrupted run, one
layer and one position at a time, and the difference of the two answers' logits says how much of the fact has come back:
0 as in the corrupted run, 1 as in the clean one (Meng et al. 2022, "Locating and Editing Factual Associations in GPT").
A logit lens (nostalgebraist 2020) beside it reads what every layer would answer.

    python -m edif_mesh.demo.patching OUT.pt [--local]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from nnsight import TransformersModel
from nnsight.modeling import huggingface

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CLEAN = "The Eiffel Tower is in the city of"
CORRUPTED = "The Colosseum is in the city of"
ANSWER, FOIL = " Paris", " Rome"


def load() -> TransformersModel:
    """Load the model from the local Hugging Face cache (weights only when a local run asks for them)."""
    huggingface._ID_CACHE[MODEL] = MODEL  # without a hub, nnsight cannot ask for the id's canonical spelling
    return TransformersModel(MODEL, task="text-generation")


def logit_lens(model: TransformersModel, remote: bool) -> torch.Tensor:
    """Return each layer's most likely next token after the clean prompt: [layers]."""
    with model.trace(CLEAN, remote=remote):
        guesses = torch.stack(
            [model.lm_head(model.model.norm(layer.output[:, -1]))[0].argmax() for layer in model.model.layers]
        ).save()
    return guesses


def patching(
    model: TransformersModel, clean: torch.Tensor, corrupted: torch.Tensor, remote: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the restored share of the fact, [layers, positions], and the two unpatched differences, [2].

    One session, so one remote job: two plain runs, then one batch of patched runs a layer.
    """
    answer, foil = (model.tokenizer(word)["input_ids"][0] for word in (ANSWER, FOIL))
    layers, positions = len(model.model.layers), clean.shape[1]
    batch = corrupted.repeat(positions, 1)
    rows = torch.arange(positions)
    with model.session(remote=remote):
        with model.trace(clean):
            states = [layer.output for layer in model.model.layers]
            logits = model.lm_head.output[0, -1]
            clean_gap = logits[answer] - logits[foil]
        with model.trace(corrupted):
            logits = model.lm_head.output[0, -1]
            corrupted_gap = logits[answer] - logits[foil]
        restored = torch.zeros(layers, positions).save()
        for index in range(layers):
            with model.trace(batch):
                hidden = model.model.layers[index].output.clone()
                hidden[rows, rows] = states[index][0]
                model.model.layers[index].output = hidden
                last = model.lm_head.output[:, -1]
                gap = last[:, answer] - last[:, foil]
                restored[index] = ((gap - corrupted_gap) / (clean_gap - corrupted_gap)).detach()
            print(f"layer {index + 1} of {layers}: {restored[index].max().item():.2f} restored at best")
        gaps = torch.stack([clean_gap, corrupted_gap]).detach().save()
    return restored, gaps


def main() -> None:
    """Run the experiment and store what it gives."""
    remote = "--local" not in sys.argv
    torch.set_num_threads(1)
    model = load()
    clean = model.tokenizer(CLEAN, return_tensors="pt")["input_ids"]
    corrupted = model.tokenizer(CORRUPTED, return_tensors="pt")["input_ids"]
    if clean.shape != corrupted.shape:
        sys.exit(f"The prompts must have equally many tokens: {clean.shape[1]} and {corrupted.shape[1]}.")
    guesses = logit_lens(model, remote)
    restored, gaps = patching(model, clean, corrupted, remote)
    words = {
        "clean": [model.tokenizer.decode(t) for t in clean[0]],
        "corrupted": [model.tokenizer.decode(t) for t in corrupted[0]],
    }
    lens = [model.tokenizer.decode(t) for t in guesses]
    torch.save({"restored": restored, "gaps": gaps, "words": words, "lens": lens}, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
