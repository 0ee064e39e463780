"""The essentials, on GPT-2 and on Llama.

`blocks(model)` finds the list of transformer blocks, whatever the architecture calls it.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.contract.constructs.construct import OTHER, PROMPT, Values, construct
from tests.contract.local_module import Steering, norms


def blocks(model: Any) -> Any:
    """The transformer blocks of a GPT-2 or a Llama."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in a block's output, which some architectures wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@construct(
    "outputs and inputs of modules",
    "usage/trace",
    "first = hidden_of(layers[0].output).save()\ngiven = layers[1].input.save()",
)
def trace(model: Any, remote: Any) -> Values:
    layers = blocks(model)
    with model.trace(PROMPT, remote=remote):
        first = hidden_of(layers[0].output).save()
        given = layers[1].input.save()
        logits = model.lm_head.output.save()
        last = model.lm_head.output[0, -1].topk(3).indices.tolist().save()
    return {"first": first, "given": given, "logits": logits, "last": last}


@construct(
    "all layers at once",
    "usage/conditionals-and-loops",
    "states = [hidden_of(layer.output)[:, -1] for layer in layers].save()",
)
def all_layers(model: Any, remote: Any) -> Values:
    layers = blocks(model)
    with model.trace(PROMPT, remote=remote):
        states = [hidden_of(layer.output)[:, -1] for layer in layers].save()
    return {"states": states}


@construct(
    "a change at every layer", "usage/access-and-modify", "for layer in layers:\n    hidden_of(layer.output)[:, 0] = 0"
)
def swap_at_every_layer(model: Any, remote: Any) -> Values:
    layers = blocks(model)
    with model.trace(PROMPT, remote=remote):
        for layer in layers:
            hidden_of(layer.output)[:, 0] = 0
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "several traces as one job, values flowing between them", "usage/session", "with model.session(remote=True):"
)
def session(model: Any, remote: Any) -> Values:
    layers = blocks(model)
    with model.session(remote=remote):
        with model.trace(PROMPT):
            clean = hidden_of(layers[0].output)[:, -1].clone()
        with model.trace(OTHER):
            hidden_of(layers[0].output)[:, -1] = clean
            patched = model.lm_head.output[0, -1].save()
        with model.trace(OTHER):
            plain = model.lm_head.output[0, -1].save()
        difference = (patched - plain).abs().max().save()
    return {"patched": patched, "plain": plain, "difference": difference}


@construct(
    "generation, with a read at each step",
    "usage/generate",
    "for _step in tracer.iter[:4]:\n    steps.append(model.lm_head.output[0, -1].argmax())\ntokens = tracer.result.save()",
)
def generate(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=4, do_sample=False, remote=remote) as tracer:
        steps = list().save()
        for _step in tracer.iter[:4]:
            steps.append(model.lm_head.output[0, -1].argmax())
        tokens = tracer.result.save()
    return {"steps": steps, "tokens": tokens}


@construct("a backward pass", "usage/backward-and-grad", "with loss.backward():\n    gradient = middle.grad.save()")
def gradients(model: Any, remote: Any) -> Values:
    layers = blocks(model)
    with model.trace(PROMPT, remote=remote):
        middle = hidden_of(layers[1].output)
        loss = model.lm_head.output.float().logsumexp(-1).sum()
        with loss.backward():
            gradient = middle.grad.save()
    return {"gradient": gradient}


@construct("an edited copy of the model", "usage/edit", "with model.edit() as (_tracer, edited):")
def edit(model: Any, remote: Any) -> Values:
    layers = blocks(model)
    with model.edit() as (_tracer, edited):
        hidden_of(blocks(edited)[0].output)[:] = 0
    with edited.trace(PROMPT, remote=remote):
        changed = model.lm_head.output.save()
    with model.trace(PROMPT, remote=remote):
        plain = model.lm_head.output.save()
    return {"changed": changed, "plain": plain}


@construct(
    "a cache of chosen modules, with inputs",
    "usage/cache",
    "kept = tracer.cache(modules=[layers[0], layers[1]], include_inputs=True)",
)
def cache(model: Any, remote: Any) -> Values:
    layers = blocks(model)
    with model.trace(PROMPT, remote=remote) as tracer:
        kept = tracer.cache(modules=[layers[0], layers[1]], include_inputs=True)
    return {
        path: (hidden_of(kept[path].output), hidden_of(kept[path].input)) for path in (layers[0].path, layers[1].path)
    }


@construct("operations inside a forward", "usage/source", "made = head.source.F_linear_0.output.save()")
def source(model: Any, remote: Any) -> Values:
    head = model.lm_head
    with model.trace(PROMPT, remote=remote):
        given = head.source.F_linear_0.input.save()
        made = head.source.F_linear_0.output.save()
    return {"given": given, "made": made}


@construct("values from one prompt to another", "usage/barrier", "meet = tracer.barrier(2)")
def barrier(model: Any, remote: Any) -> Values:
    layers = blocks(model)
    with model.trace(remote=remote) as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(PROMPT):
            taken = hidden_of(layers[0].output)[:, -1].clone()
            meet()
        with tracer.invoke(PROMPT + " and"):
            meet()
            hidden_of(layers[1].output)[:, -1] = taken
            logits = model.lm_head.output[:, -1].save()
    return {"logits": logits}


@construct(
    "several prompts in one pass",
    "usage/invoke-and-batching",
    "with tracer.invoke([OTHER, PROMPT]):\n    two = model.lm_head.output[:, -1].save()",
)
def batching(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        with tracer.invoke(PROMPT):
            one = model.lm_head.output[:, -1].save()
        with tracer.invoke([OTHER, PROMPT]):
            two = model.lm_head.output[:, -1].save()
        with tracer.invoke():
            everything = model.lm_head.output.shape.save()
    return {"one": one, "two": two, "everything": everything}


@construct(
    "functions and classes of your own, also from another file",
    "remote/register-local-modules",
    "hidden[:] = steering.apply(hidden)\nprobed = probe(hidden).save()",
)
def local_helpers(model: Any, remote: Any) -> Values:
    layers, steering = blocks(model), Steering(2.0)

    def centred(hidden: torch.Tensor) -> torch.Tensor:
        return hidden - hidden.mean(dim=-1, keepdim=True)

    class Probe:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
            return centred(hidden) * self.scale

    probe = Probe(3.0)
    with model.trace(PROMPT, remote=remote):
        hidden = hidden_of(layers[0].output)
        hidden[:] = steering.apply(hidden)
        probed = probe(hidden).save()
        lengths = norms(hidden).save()
        logits = model.lm_head.output[0, -1].save()
    return {"probed": probed, "lengths": lengths, "logits": logits}


@construct(
    "modules applied out of order",
    "patterns/logit-lens",
    "model.lm_head(norm(hidden_of(layer.output)))[0, -1].argmax()",
)
def logit_lens(model: Any, remote: Any) -> Values:
    layers = blocks(model)
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    with model.trace(PROMPT, remote=remote):
        guesses = torch.stack([model.lm_head(norm(hidden_of(layer.output)))[0, -1].argmax() for layer in layers]).save()
    return {"guesses": guesses}


@construct("nested containers, and the whole model output", "usage/save", "whole = model.output.save()")
def nested(model: Any, remote: Any) -> Values:
    layers = blocks(model)
    with model.trace(PROMPT, remote=remote):
        hidden = hidden_of(layers[0].output)
        found = {
            "all": [hidden, hidden[0]],
            ("a", 1): (1, 2.5, None, True),
            "shape": hidden.shape,
            "kind": hidden.dtype,
        }.save()
        whole = model.output.save()
    return {"found": found, "whole": whole}
