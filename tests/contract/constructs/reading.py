"""Reading values."""

from __future__ import annotations

from typing import Any

import nnsight
import torch

from tests.contract.constructs.construct import OTHER, PROMPT, Values, construct


@construct("the model's output, and its logits", "README, quick start", "logits = model.output.logits.save()")
def model_output(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        logits = model.output.logits.save()
    return {"logits": logits}


@construct("first input of a module", "usage/access-and-modify", "given = model.transformer.h[1].mlp.input.save()")
def module_input(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        given = model.transformer.h[1].mlp.input.save()
    return {"given": given}


@construct(
    "all inputs of a module, by position and by name",
    "usage/access-and-modify",
    "args, kwargs = model.transformer.h[0].attn.inputs",
)
def module_inputs(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        args, kwargs = model.transformer.h[0].attn.inputs
        first = args[0].save()
        names = sorted(kwargs).save()
    return {"first": first, "names": names}


@construct(
    "an element of a tuple output", "usage/access-and-modify", "attended = model.transformer.h[0].attn.output[0].save()"
)
def tuple_output(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        attended = model.transformer.h[0].attn.output[0].save()
        parts = len(model.transformer.h[1].attn.output).save()
    return {"attended": attended, "parts": parts}


@construct("a whole tuple output", "usage/access-and-modify", "whole = model.transformer.h[0].attn.output.save()")
def whole_tuple(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        whole = model.transformer.h[0].attn.output.save()
    return {"whole": whole}


@construct(
    "negative indices and slices of a module list",
    "usage/trace",
    "last = model.transformer.h[-1].output.save()\nfor layer in model.transformer.h[:2]",
)
def indices(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        norms = [layer.output.norm() for layer in model.transformer.h[:2]].save()
        last = model.transformer.h[-1].output.save()
    return {"norms": norms, "last": last}


@construct(
    "a module or a value by its path",
    "reference/api-quick-reference",
    'value = model.get("transformer.h.0.mlp.output").save()',
)
def by_path(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        value = model.get("transformer.h.0.mlp.output").save()
        also = model.get(f"transformer.h.{1}").output.save()
    return {"value": value, "also": also}


@construct(
    "walking over all modules",
    "reference/api-quick-reference",
    'paths = [module.path for module in model.modules()].save()\nmodel.named_modules(lambda envoy: "mlp" in envoy.path)',
)
def walk(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        paths = [module.path for module in model.modules()].save()
        chosen = model.named_modules(lambda envoy: "mlp" in envoy.path)
        names = [path for path, _ in chosen].save()
        logits = model.lm_head.output.save()
    return {"paths": paths, "names": names, "logits": logits}


@construct(
    "shape, dtype and device of a value",
    "usage/access-and-modify",
    "shape = hidden.shape.save()\nkind = hidden.dtype.save()\nwhere = hidden.device.save()",
)
def shape_and_kind(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        shape = hidden.shape.save()
        kind = hidden.dtype.save()
        where = hidden.device.save()
        width = nnsight.save(hidden.shape[-1])
    return {"shape": shape, "kind": kind, "where": where, "width": width}


@construct(
    "nnsight.save(value) in place of value.save()",
    "usage/save",
    "hidden = nnsight.save(model.transformer.h[-1].output)",
)
def save_function(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = nnsight.save(model.transformer.h[-1].output)
        number = nnsight.save(2)
    return {"hidden": hidden, "number": number}


@construct("save later, under another name", "usage/save", "kept = hidden.save()")
def save_later(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        doubled = hidden * 2
        kept = hidden.save()
        both = (kept + doubled).save()
    return {"kept": kept, "both": both}


@construct(
    "a name bound anew after save() is not saved",
    "usage/save",
    "value = model.lm_head.output.save()\nvalue = 2",
)
def rebound(model: Any, remote: Any) -> Values:
    value = "before"
    with model.trace(PROMPT, remote=remote):
        value = model.lm_head.output.save()
        value = 2
        logits = model.output.logits.save()
    return {"value": value, "logits": logits}


@construct("clone before a change", "usage/access-and-modify", "before = model.transformer.h[0].output.clone().save()")
def clone_first(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        before = model.transformer.h[0].output.clone().save()
        model.transformer.h[0].output[:] = 0
        after = model.transformer.h[0].output.save()
    return {"before": before, "after": after}


@construct(
    "detach and move to the CPU before saving", "remote/remote-trace", "model.lm_head.output.detach().cpu().save()"
)
def detached(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        logits = model.lm_head.output.detach().cpu().save()
    return {"logits": logits}


@construct(
    "casts to other number types",
    "usage/access-and-modify",
    "half = hidden.half().save()\nbrain = hidden.to(torch.bfloat16).save()",
)
def casts(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        half = hidden.half().save()
        brain = hidden.to(torch.bfloat16).save()
        double = hidden.double().mean().save()
        whole = hidden.round().long().save()
    return {"half": half, "brain": brain, "double": double, "whole": whole}


@construct(
    "plain numbers, lists and arrays out of tensors",
    "usage/save",
    "number = logits.argmax().item().save()\narray = logits[0, -1].detach().numpy().save()",
)
def plain_numbers(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        logits = model.lm_head.output
        number = logits.argmax().item().save()
        numbers = logits[0, -1, :5].tolist().save()
        array = logits[0, -1].detach().numpy().save()
    return {"number": number, "numbers": numbers, "array": array.tolist()}


@construct(
    "torch operations on values",
    "walkthrough, operations on values",
    "torch.topk(torch.softmax(logits, dim=-1), 5)",
)
def torch_operations(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        logits = model.lm_head.output[0, -1]
        top = torch.topk(torch.softmax(logits, dim=-1), 5)
        values, places = top.values.save(), top.indices.save()
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum().save()
        product = torch.einsum(
            "bsh,bth->bst", model.output.hidden_states or logits[None, None], logits[None, None]
        ).save()
    return {"values": values, "places": places, "product": product}


@construct("weights of the model", "usage/access-and-modify", "norms = model.lm_head.weight.norm(dim=-1).save()")
def weights(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        norms = model.lm_head.weight.norm(dim=-1).save()
        bias = model.transformer.h[0].mlp.c_fc.bias.detach().save()
        total = sum(p.numel() for p in model.parameters()).save()
    return {"norms": norms, "bias": bias, "total": total}


@construct("the model's configuration", "patterns/per-head-attention", "heads = model.config.n_head")
def configuration(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        heads = model.config.n_head
        attended = model.transformer.h[0].attn.output[0]
        parts = attended.view(*attended.shape[:2], heads, -1).save()
    return {"parts": parts}


@construct(
    "the tokenizer inside a block",
    "usage/stop-and-early-exit",
    "text = model.tokenizer.decode(best).save()",
)
def tokenizer_inside(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        best = model.lm_head.output[0, -1].argmax()
        text = model.tokenizer.decode(best).save()
        ids = model.tokenizer.encode(" Paris").save()
    return {"text": text, "ids": ids}


@construct(
    "modules out of order, in a block of their own",
    "usage/invoke-and-batching",
    "with tracer.invoke():\n    earlier = model.transformer.h[0].output.save()",
)
def out_of_order(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        with tracer.invoke(OTHER):
            later = model.transformer.h[1].output.save()
        with tracer.invoke():
            earlier = model.transformer.h[0].output.save()
    return {"later": later, "earlier": earlier}


@construct("what the model returned", "usage/trace", "whole = tracer.result.save()")
def returned(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote) as tracer:
        whole = tracer.result.save()
    return {"logits": whole.logits, "kind": type(whole).__name__}
