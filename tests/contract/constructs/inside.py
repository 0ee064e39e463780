"""Inside modules: operations, names, calls."""

from __future__ import annotations

from typing import Any

import torch
from nnsight import NNsight
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty

from tests.contract.constructs.construct import PROMPT, Values, construct, loaded_again


class Heads(Envoy):
    """An attention module whose output is also served as heads."""

    @eproperty(key="output")
    def heads(self, value: Any) -> Any:
        return value[0].view(*value[0].shape[:2], 4, -1)


@construct(
    "an operation's output", "usage/source", "model.transformer.h[0].attn.source.attention_interface_1.output[0].save()"
)
def operation_output(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        attended = model.transformer.h[0].attn.source.attention_interface_1.output[0].save()
    return {"attended": attended}


@construct(
    "an operation's inputs",
    "usage/source",
    "args, kwargs = model.transformer.h[0].attn.source.attention_interface_1.inputs",
)
def operation_inputs(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        args, kwargs = model.transformer.h[0].attn.source.attention_interface_1.inputs
        query = args[1].save()
        names = sorted(kwargs).save()
    return {"query": query, "names": names}


@construct(
    "an operation's output changed", "usage/source", "model.transformer.h[0].attn.source.self_c_proj_0.output[:] = 0"
)
def operation_changed(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.transformer.h[0].attn.source.self_c_proj_0.output[:] = 0
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "operations inside operations",
    "usage/source, recursive source",
    "inner = model.transformer.h[0].attn.source.attention_interface_1.source",
)
def nested_operations(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        inner = model.transformer.h[0].attn.source.attention_interface_1.source
        weights = inner.torch_nn_functional_scaled_dot_product_attention_0.output.save()
    return {"weights": weights}


@construct("the list of a module's operations", "usage/source", "print(model.transformer.h[0].attn.source)")
def list_of_operations(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        text = str(model.transformer.h[0].mlp.source).save()
        logits = model.lm_head.output.save()
        print(model.transformer.h[0].attn.source)
    return {"text": text}


@construct("an operation skipped", "usage/skip", "operation.skip(operation.input * 2)")
def operation_skipped(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        operation = model.transformer.h[0].mlp.source.self_act_0
        operation.skip(operation.input * 2)
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "an operation at each step of a generation",
    "usage/source, iteration",
    "found.append(model.lm_head.source.F_linear_0.output[0, -1].argmax())",
)
def operation_in_loop(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3, remote=remote) as tracer:
        found = list().save()
        for _step in tracer.iter[:3]:
            found.append(model.lm_head.source.F_linear_0.output[0, -1].argmax())
    return {"found": found}


@construct(
    "attention weights, with eager attention",
    "patterns/attention-patterns",
    'attn_implementation="eager"\n_, weights = fresh.transformer.h[0].attn.output',
)
def attention_weights(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=not remote, attn_implementation="eager")
    with fresh.trace(PROMPT, remote=remote):
        _, weights = fresh.transformer.h[0].attn.output
        kept = weights.save()
    return {"kept": kept}


@construct(
    "modules under names of your own",
    "usage/rename-modules",
    'rename={"transformer.h": "layers", "mlp": "feedforward"}',
)
def renamed(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=not remote, rename={"transformer.h": "layers", "mlp": "feedforward"})
    with fresh.trace(PROMPT, remote=remote):
        inner = fresh.layers[0].feedforward.output.save()
        also = fresh.transformer.h[1].mlp.output.save()
    return {"inner": inner, "also": also}


@construct(
    "views of your own on a module",
    "patterns/per-head-attention",
    "parts = fresh.transformer.h[0].attn.heads.save()",
    refused="cannot pickle 'eproperty' object",
    note="nnsight cannot send a class that has an eproperty; use a function of the value",
)
def own_envoy(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=not remote, envoys={"attn": Heads})
    with fresh.trace(PROMPT, remote=remote):
        parts = fresh.transformer.h[0].attn.heads.save()
    return {"parts": parts}


@construct(
    "a module called out of its order",
    "usage/access-and-modify",
    "model.lm_head(model.transformer.ln_f(hidden))",
)
def ad_hoc_call(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        logits = model.lm_head(model.transformer.ln_f(hidden)).save()
        whole = model.transformer.h[1](hidden).save()
    return {"logits": logits, "whole": whole}


@construct(
    "a module called so that the trace sees it",
    "usage/access-and-modify",
    "model.transformer.h[0].mlp(hidden, hook=True)",
)
def hooked_call(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        again = model.transformer.h[0].mlp(hidden, hook=True).save()
        inner = model.transformer.h[1].mlp.output.save()
    return {"again": again, "inner": inner}


@construct(
    "a module attached to the model",
    "patterns/sae-and-auxiliary-modules",
    "fresh.transformer.h[0].sae = torch.nn.Linear(width, width)",
    refused="Your code uses the module 'model.transformer.h.0.sae', which the model at this site does not have: a module that you "
    "attach to a model does not travel. Keep the torch module in a variable of its own and call that in the block; it is sent "
    "along with its weights.",
)
def attached_module(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=True)
    width = fresh.config.n_embd
    fresh.transformer.h[0].sae = torch.nn.Linear(width, width)
    with fresh.trace(PROMPT, remote=remote):
        hidden = fresh.transformer.h[0].output
        fresh.transformer.h[0].output = fresh.transformer.h[0].sae(hidden, hook=True)
        logits = fresh.lm_head.output.save()
    return {"shape": logits.shape}


@construct(
    "a module attached to the model, called by an edit",
    "usage/edit",
    "with fresh.edit(inplace=True):\n    acts = fresh.transformer.h[0].output",
    refused="Your code uses the module 'model.transformer.h.0.sae', which the model at this site does not have: a module that you attach to a model "
    "does not travel. Keep the torch module in a variable of its own and call that in the block; it is sent along with its weights.",
)
def attached_by_edit(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=True)
    width = fresh.config.n_embd
    fresh.transformer.h[0].sae = torch.nn.Linear(width, width)
    with fresh.edit(inplace=True):
        acts = fresh.transformer.h[0].output
        fresh.transformer.h[0].output = fresh.transformer.h[0].sae(acts, hook=True)
    with fresh.trace(PROMPT, remote=remote):
        logits = fresh.lm_head.output.save()
    return {"shape": logits.shape}


@construct(
    "a module of yours wrapped with NNsight",
    "patterns/sae-and-auxiliary-modules",
    "wrapped = NNsight(torch.nn.Linear(width, width))",
    refused="Your code uses a module that is wrapped with NNsight(...), which nnsight cannot tell from the site's model. Call the "
    "torch module itself in the block; it is sent along with its weights.",
)
def wrapped_module(model: Any, remote: Any) -> Values:
    width = model.config.n_embd
    torch.manual_seed(2)
    wrapped = NNsight(torch.nn.Linear(width, width))
    with model.trace(PROMPT, remote=remote):
        codes = wrapped(model.transformer.h[0].output).save()
    return {"codes": codes}
