"""Changing values."""

from __future__ import annotations

from typing import Any

import torch

from tests.contract.constructs.construct import PROMPT, Values, construct


@construct("in place, everywhere", "usage/access-and-modify", "model.transformer.h[0].output[:] = 0")
def in_place(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.transformer.h[0].output[:] = 0
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("a new output", "usage/access-and-modify", "model.transformer.h[0].output = hidden * 2")
def new_output(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        model.transformer.h[0].output = hidden * 2
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "a new tuple output",
    "usage/access-and-modify",
    "model.transformer.h[0].attn.output = (torch.zeros_like(out[0]), *out[1:])",
)
def new_tuple(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        out = model.transformer.h[0].attn.output
        model.transformer.h[0].attn.output = (torch.zeros_like(out[0]), *out[1:])
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "in place, in an element of a tuple",
    "reference/api-quick-reference",
    "model.transformer.h[0].attn.output[0][:] = 0",
)
def inside_tuple(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.transformer.h[0].attn.output[0][:] = 0
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "a new first input", "usage/access-and-modify", "model.transformer.h[1].input = model.transformer.h[1].input * 0.5"
)
def new_input(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.transformer.h[1].input = model.transformer.h[1].input * 0.5
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("all new inputs", "usage/access-and-modify", "model.transformer.h[1].mlp.inputs = ((args[0] + 1,), kwargs)")
def new_inputs(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        args, kwargs = model.transformer.h[1].mlp.inputs
        model.transformer.h[1].mlp.inputs = ((args[0] + 1,), kwargs)
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("adding to a position", "patterns/steering", "model.transformer.h[0].output[:, -1, :] += direction * 4.0")
def steering(model: Any, remote: Any) -> Values:
    direction = torch.linspace(-1, 1, model.config.n_embd)
    with model.trace(PROMPT, remote=remote):
        model.transformer.h[0].output[:, -1, :] += direction * 4.0
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "adding over a span, in several layers",
    "patterns/steering",
    "model.transformer.h[layer].output[:, 2:5, :] += direction / 2",
)
def steering_layers(model: Any, remote: Any) -> Values:
    direction = torch.linspace(-1, 1, model.config.n_embd)
    with model.trace(PROMPT, remote=remote):
        for layer in [0, 1]:
            model.transformer.h[layer].output[:, 2:5, :] += direction / 2
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "one position or one feature set to zero",
    "patterns/ablation",
    "model.transformer.h[0].mlp.output[:, -1, :] = 0\nmodel.transformer.h[1].mlp.output[:, :, 12] = 0",
)
def ablation(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.transformer.h[0].mlp.output[:, -1, :] = 0
        model.transformer.h[1].mlp.output[:, :, 12] = 0
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("one attention head set to zero, through a view", "patterns/per-head-attention", "parts[:, :, 2, :] = 0")
def head_ablation(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        attended = model.transformer.h[0].attn.output[0]
        rows, length, _ = attended.shape
        parts = attended.view(rows, length, model.config.n_head, -1)
        parts[:, :, 2, :] = 0
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("a value from an earlier trace", "patterns/ablation", "model.transformer.h[1].mlp.output[:, -1, :] = mean")
def mean_ablation(model: Any, remote: Any) -> Values:
    with model.trace(["hello world", "a small tokenizer"], remote=remote):
        mean = model.transformer.h[1].mlp.output[:, -1, :].mean(0).save()
    with model.trace(PROMPT, remote=remote):
        model.transformer.h[1].mlp.output[:, -1, :] = mean
        logits = model.lm_head.output.save()
    return {"mean": mean, "logits": logits}


@construct("new embeddings", "usage/barrier", "model.transformer.wte.output = embeddings.flip(1)")
def new_embeddings(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        embeddings = model.transformer.wte.output
        model.transformer.wte.output = embeddings.flip(1)
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "other logits out of the model", "walkthrough, modifying vs. replacing", "model.lm_head.output[..., 7] = 100.0"
)
def new_logits(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.lm_head.output[..., 7] = 100.0
        best = model.output.logits.argmax(-1).save()
    return {"best": best}


@construct(
    "where, masks and index writes",
    "usage/access-and-modify",
    "hidden[hidden < 0] = 0\nhidden.index_fill_(1, torch.tensor([0, 2]), 1.0)",
)
def masks(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        hidden[hidden < 0] = 0
        hidden.index_fill_(1, torch.tensor([0, 2]), 1.0)
        model.transformer.h[1].output = torch.where(hidden > 1, hidden, model.transformer.h[1].output)
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "skip a module with its input",
    "usage/skip",
    "model.transformer.h[0].skip(model.transformer.h[0].input)",
)
def skip_layer(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.transformer.h[0].skip(model.transformer.h[0].input)
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("skip a module with an earlier output", "usage/skip", "model.transformer.h[1].skip(first)")
def skip_with_output(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        first = model.transformer.h[0].output
        model.transformer.h[1].skip(first)
        second = model.transformer.h[1].output.save()
    return {"second": second}


@construct(
    "skip a module with a value of your own", "usage/skip", "model.transformer.h[1].mlp.skip(torch.zeros_like(given))"
)
def skip_with_zeros(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        given = model.transformer.h[1].mlp.input
        model.transformer.h[1].mlp.skip(torch.zeros_like(given))
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "skip in every block of a batch",
    "usage/skip, constraints",
    "model.transformer.h[1].skip(model.transformer.h[1].input)",
)
def skip_in_batch(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        with tracer.invoke(PROMPT):
            model.transformer.h[1].skip(model.transformer.h[1].input)
            one = model.lm_head.output.save()
        with tracer.invoke("hello"):
            model.transformer.h[1].skip(model.transformer.h[1].input * 2)
            two = model.lm_head.output.save()
    return {"one": one, "two": two}


@construct(
    "weights changed for one trace only",
    "usage/access-and-modify",
    "model.lm_head.weight.data[:, 0] = 0",
    note="a runner's weights are its own: the next job sees the site's",
)
def changed_weights(model: Any, remote: Any) -> Values:
    before = model.lm_head.weight.data.clone()
    with model.trace(PROMPT, remote=remote):
        model.lm_head.weight.data[:, 0] = 0
        logits = model.output.logits.save()
    model.lm_head.weight.data[:] = before
    with model.trace(PROMPT, remote=remote):
        afterwards = model.output.logits.save()
    return {"logits": logits, "afterwards": afterwards}
