"""The traces that the comparisons of runners measure: what researchers do, on two models, the same in every process.

Needs torch, transformers and nnsight only, so that a peer's own environment can run it (`benchmarks/peers`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = "The Eiffel Tower is in the city of"
NEW_TOKENS = 20

Trace = Callable[[Any, str, Any], Any]
"""Called with a model, the path of its blocks, and an nnsight backend (None: here). Returns what it found, None if it ran elsewhere."""


def empty(model: Any, blocks: str, backend: Any = None) -> Any:
    """Stop before the first block: what a job costs that does nothing."""
    with model.trace(PROMPT, backend=backend) as tracer:
        found = model.get(blocks)[0].input.save()
        tracer.stop()
    return locals().get("found")


def one_value(model: Any, blocks: str, backend: Any = None) -> Any:
    """Read one hidden state."""
    with model.trace(PROMPT, backend=backend):
        found = model.get(blocks)[-1].output.save()
    return locals().get("found")


def all_layers(model: Any, blocks: str, backend: Any = None) -> Any:
    """Read the hidden state behind every block."""
    with model.trace(PROMPT, backend=backend):
        found = [].save()
        for block in model.get(blocks):
            found.append(block.output)
    return locals().get("found")


def swap_everywhere(model: Any, blocks: str, backend: Any = None) -> Any:
    """Replace the hidden state behind every block, read the logits."""
    with model.trace(PROMPT, backend=backend):
        for block in model.get(blocks):
            block.output = block.output * 1.01
        found = model.lm_head.output.save()
    return locals().get("found")


def gradients(model: Any, blocks: str, backend: Any = None) -> Any:
    """The gradient of a logit with respect to the hidden state behind every block."""
    with model.trace(PROMPT, backend=backend):
        hidden = [block.output for block in model.get(blocks)]
        loss = model.lm_head.output[0, -1].max()
        found = [].save()
        with loss.backward():
            for state in reversed(hidden):
                found.append(state.grad)
    return locals().get("found")


def generation(model: Any, blocks: str, backend: Any = None) -> Any:
    """Generate 20 tokens and read one hidden state at each."""
    with model.generate(
        PROMPT, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, backend=backend
    ) as tracer:
        found = [].save()
        for _ in tracer.iter[0:NEW_TOKENS]:
            found.append(model.get(blocks)[-1].output)
    return locals().get("found")


TRACES: dict[str, Trace] = {
    "nothing": empty,
    "one value": one_value,
    "all layers": all_layers,
    "swap at every layer": swap_everywhere,
    "gradients over all layers": gradients,
    "20 tokens, a read each": generation,
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to measure: its hub id, and where its blocks are."""

    name: str
    repo_id: str
    blocks: str


SUBJECTS = {
    "smollm2": Subject("SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "model.layers"),
    "deep": Subject("48 small layers", "edif-test/deep-gpt2", "transformer.h"),
}


def prepare_cache() -> Path:
    """Have the models in the cache that tests use, and let this process find them there, offline, with one thread.

    Call before torch, transformers or huggingface_hub is imported. SmolLM2 must have been fetched before (`python -m benchmarks.runner` does).
    """
    from tests import models

    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(models.cache()), "HF_HUB_DISABLE_TELEMETRY": "1"}
    models.deep_gpt2()
    return models.cache()


def folder_of(repo_id: str, cache: Path) -> Path:
    """Return the folder of a cached model."""
    base = cache / f"models--{repo_id.replace('/', '--')}"
    return base / "snapshots" / (base / "refs" / "main").read_text().strip()


def load(repo_id: str) -> Any:
    """Load a model for runs in this process, as a model host loads it."""
    import torch
    from nnsight import TransformersModel
    from nnsight.modeling import huggingface

    torch.set_num_threads(1)
    huggingface._ID_CACHE[repo_id] = repo_id  # no question to the hub
    model = TransformersModel(repo_id, task="text-generation", dispatch=True)
    model._module.eval()
    return model


class Capture:
    """An nnsight backend that keeps the serialized trace instead of running it."""

    payload: bytes = b""

    def __call__(self, tracer: Any) -> None:
        """Called by nnsight with the tracer."""
        from nnsight.schema.request import RequestModel

        self.payload = RequestModel.serialize(tracer, False)


def payload_of(trace: Trace, model: Any, blocks: str) -> bytes:
    """Return the payload that nnsight's own client would send for `trace`."""
    capture = Capture()
    trace(model, blocks, capture)
    return capture.payload


def same(here: Any, there: Any) -> bool:
    """Whether two results are equal to the bit: tensors, or lists of them."""
    import torch

    if isinstance(here, list):
        return isinstance(there, list) and len(here) == len(there) and all(map(same, here, there))
    return isinstance(there, torch.Tensor) and here.dtype == there.dtype and torch.equal(here, there)
