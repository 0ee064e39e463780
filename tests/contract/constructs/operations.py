"""Operations, aliases and hooks."""

from __future__ import annotations

from typing import Any

import nnsight
import torch
from nnsight.intervention.backends.remote import RemoteError

from tests.contract.constructs.construct import PROMPT, Values, caught, construct, loaded_again


@construct(
    "a variable of a forward",
    "usage/source",
    "model.transformer.h[0].mlp.source.hidden_states_1.output.save()",
)
def assigned_value(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        act = model.transformer.h[0].mlp.source.hidden_states_1.output.save()
    return {"act": act}


@construct(
    "a variable of a forward, bound anew",
    "usage/source",
    "operation.output = operation.output * 2",
)
def assigned_anew(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        operation = model.transformer.h[0].mlp.source.hidden_states_1
        operation.output = operation.output * 2
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "an operation after a part of its module",
    "usage/source",
    "_ = model.transformer.h[1].attn.source\nqkv = model.transformer.h[1].attn.c_attn.output.save()",
    note="touch `source` first in the block",
)
def warmed_source(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        _ = model.transformer.h[1].attn.source
        qkv = model.transformer.h[1].attn.c_attn.output.save()
        attended = model.transformer.h[1].attn.source.attention_interface_1.output[0].save()
    return {"qkv": qkv, "attended": attended}


@construct(
    "source touched before the trace",
    "usage/source",
    "_ = model.transformer.h[1].attn.source\nwith model.trace(PROMPT, remote=True):",
    refused="OutOfOrderError: 'model.transformer.h.1.attn.source.attention_interface_1.output.i0' was requested but the model already "
    "ran past it",
    note="what is touched is your own model, not the site's: touch it in the block, as in the row above",
)
def warmed_before(model: Any, remote: Any) -> Values:
    _ = model.transformer.h[1].attn.source
    try:
        with model.trace(PROMPT, remote=remote):
            qkv = model.transformer.h[1].attn.c_attn.output.save()
            attended = model.transformer.h[1].attn.source.attention_interface_1.output[0].save()
    except RemoteError as error:
        raise RuntimeError(caught(error)) from error
    return {"qkv": qkv, "attended": attended}


@construct(
    "attention weights as an operation's result",
    "patterns/attention-patterns",
    ".source.nn_functional_softmax_0",
)
def softmax_operation(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=not remote, attn_implementation="eager")
    with fresh.trace(PROMPT, remote=remote):
        weights = (
            fresh.transformer.h[0].attn.source
            .attention_interface_1
            .source.nn_functional_softmax_0
            .output.save()
        )  # fmt: skip
    return {"weights": weights}


@construct(
    "attention weights of all layers",
    "patterns/attention-patterns",
    "fresh.trace(PROMPT, output_attentions=True, remote=True)",
)
def all_attentions(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=not remote, attn_implementation="eager")
    with fresh.trace(PROMPT, output_attentions=True, remote=remote):
        attentions = fresh.output.attentions.save()
    return {"attentions": attentions}


@construct(
    "an operation on a branch that does not run",
    "usage/source",
    "model.transformer.h[0].attn.source.transpose_0.output.save()",
    says="OutOfOrderError: 'model.transformer.h.0.attn.source.transpose_0.output.i0' was requested but the model already ran past it",
)
def dead_operation(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            key = model.transformer.h[0].attn.source.transpose_0.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "operations of a call that is a module",
    "usage/source",
    "model.transformer.h[0].mlp.source.self_c_fc_0.source",
    says="SourceNotAvailable: 'self_c_fc_0' calls a submodule; call `.source` on that submodule directly instead of drilling into "
    "the call",
)
def module_call_source(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            inner = model.transformer.h[0].mlp.source.self_c_fc_0.source
            logits = model.lm_head.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "aliases of every form",
    "usage/rename-modules",
    'rename={"transformer": ["mdl", "backbone"], "*.h": "blocks", "attn.c_proj": "attn.o_proj", kind: "network"}',
)
def every_alias(model: Any, remote: Any) -> Values:
    kind = type(model.transformer.h[0].mlp._module)
    fresh = loaded_again(
        model,
        dispatch=not remote,
        rename={"transformer": ["mdl", "backbone"], "*.h": "blocks", "attn.c_proj": "attn.o_proj", kind: "network"},
    )
    with fresh.trace(PROMPT, remote=remote):
        projected = fresh.blocks[0].attn.o_proj.output.save()
        made = fresh.backbone.h[0].network.output.save()
        last = fresh.mdl.h[1].output.save()
    return {"projected": projected, "made": made, "last": last}


@construct(
    "a cache under aliases",
    "usage/cache, usage/rename-modules",
    "kept._cache.model = fresh\nby_alias = kept.transformer.h[-1].my_mlp.output",
    note="without that first line, by the modules' own names and by number from the front",
)
def cache_under_aliases(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=not remote, rename={"mlp": "my_mlp"})
    with fresh.trace(PROMPT, remote=remote) as tracer:
        kept = tracer.cache(modules=[fresh.transformer.h[-1].mlp])
    kept._cache.model = fresh
    by_alias = kept.transformer.h[-1].my_mlp.output
    return {"by_alias": by_alias, "paths": list(kept.keys())}


@construct(
    "a torch hook on a module",
    "reference/api-quick-reference",
    "handle = model.lm_head._module.register_forward_hook(double)",
)
def torch_hook(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):

        def double(_module: Any, _args: Any, output: Any) -> Any:
            return output * 2

        handle = model.lm_head._module.register_forward_hook(double)
        with model.trace(PROMPT):
            logits = model.lm_head.output.save()
        handle.remove()
    return {"logits": logits}


@construct(
    "children, their number and their device",
    "reference/api-quick-reference",
    "number = len(model.transformer.h)\nnew = torch.ones(hidden.shape[-1], device=model.transformer.device)",
)
def children(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        number = len(model.transformer.h)
        hidden = model.transformer.h[0].output
        new = torch.ones(hidden.shape[-1], device=model.transformer.device)
        hidden += new
        kept = nnsight.save([number, len(model.transformer.devices)])
        logits = model.lm_head.output.save()
    return {"kept": kept, "logits": logits}
