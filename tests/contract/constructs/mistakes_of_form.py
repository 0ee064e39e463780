"""Old names, and mistakes of form."""

from __future__ import annotations

import warnings
from typing import Any

import nnsight
import torch

from tests.contract.constructs.construct import OTHER, PROMPT, Values, caught, construct


@construct(
    "loops of the model instead of the tracer",
    "reference/migrating-to-0.8",
    "for _step in model.iter[:2]:\nfor _step in model.all():",
    note="nnsight warns that they are deprecated",
)
def loops_of_the_model(model: Any, remote: Any) -> Values:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nnsight.NNsightDeprecationWarning)
        with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3, remote=remote):
            first = nnsight.save([])
            for _step in model.iter[:2]:
                first.append(model.lm_head.output[0, -1].argmax())
        with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3, remote=remote):
            every = nnsight.save([])
            for _step in model.all():
                every.append(model.lm_head.output[0, -1].argmax())
    return {"first": first, "every": every}


@construct(
    "a list of the older nnsight",
    "reference/migrating-to-0.8",
    "found = nnsight.list()",
    says="AttributeError: module 'nnsight' has no attribute 'list'",
)
def older_list(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            model.transformer.h[0].output
            found = nnsight.list()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "value of the older nnsight",
    "reference/migrating-to-0.8",
    "hidden.value",
    says="AttributeError: 'Tensor' object has no attribute 'value'",
)
def older_value(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output.save()
    try:
        hidden.value
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "a block that begins with try",
    "errors/with-block-not-found",
    "with model.trace(PROMPT, remote=True):\n    try:",
    note="said by nnsight before anything is sent",
    says="ValueError: A traced `with` block cannot start with `try:`; nnsight intercepts the body at its first line, and a `try` there "
    "is the one statement Python gives it no way back out of. Put any statement above the `try`, or move the `try` outside the block.",
)
def try_first(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            try:
                hidden = model.transformer.h[0].output.save()
            finally:
                pass
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "a save before the block",
    "errors/save-outside-trace",
    "found = nnsight.save([])\nwith model.trace(PROMPT, remote=True):",
    note="said by nnsight before anything is sent",
    says="ValueError: save() was called outside a trace. `.save()` / nnsight.save(x) marks a value to return from the enclosing "
    "`with model.trace(...):` block, so it only works inside one — move the save into the trace block.",
)
def save_outside(model: Any, remote: Any) -> Values:
    try:
        found = nnsight.save([])
        with model.trace(PROMPT, remote=remote):
            found.append(model.transformer.h[0].output)
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "a trace without a prompt that asks for nothing",
    "errors/cannot-access-outside-interleaving",
    "with model.trace(remote=True):\n    shift = 1",
    says="ValueError: trace() needs an input, or at least one `with tracer.invoke(...)` block",
)
def nothing_to_run(model: Any, remote: Any) -> Values:
    try:
        with model.trace(remote=remote):
            shift = 1
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "a trace inside a trace",
    "errors/invoke-during-execution",
    "with model.trace(PROMPT, remote=True):\n    hidden = model.transformer.h[0].output\n    with model.trace(OTHER):",
    says="ValueError: cyclic parent chain",
)
def nested_trace(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            hidden = model.transformer.h[0].output
            with model.trace(OTHER):
                inner = model.transformer.h[0].output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "an output of another shape than the next module wants",
    "errors/debug-mode",
    "model.transformer.h[0].output = torch.zeros(3, 3)",
    note="N: the width of the model",
    says="RuntimeError: Given normalized_shape=[N], expected input with shape [*, N], but got input of size[3, 3]",
)
def wrong_shape(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            model.transformer.h[0].output
            model.transformer.h[0].output = torch.zeros(3, 3)
            logits = model.lm_head.output.save()
    except Exception as error:
        said = caught(error).replace(str(model.config.n_embd), "N")
    return {"said": said}


@construct(
    "a skip with a tuple where a tensor belongs",
    "usage/skip",
    "model.transformer.h[1].skip((first,))",
    says="TypeError: layer_norm(): argument 'input' (position 1) must be Tensor, not tuple",
)
def wrong_skip(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            first = model.transformer.h[0].output
            model.transformer.h[1].skip((first,))
            logits = model.lm_head.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "the name in place of the module",
    "errors/symptom-index",
    "acts = model.transformer.h[0].output\nacts = acts * 0",
    note="changes nothing, here and there",
)
def bound_name(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        acts = model.transformer.h[0].output
        acts = acts * 0
        logits = model.output.logits.save()
    return {"logits": logits}


@construct(
    "two names for one saved tuple",
    "usage/save",
    "whole, rest = model.transformer.h[0].attn.output.save()",
    note="the tuple has no name, so nothing comes back: save first, take apart after the block",
)
def unpacked_save(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        whole, rest = model.transformer.h[0].attn.output.save()
    return {"there": "whole" in locals()}


@construct(
    "a cache that is declared late",
    "usage/cache",
    "hidden = model.transformer.h[0].output\nkept = tracer.cache()",
    says="ValueError: tracer.cache() must be declared before reading or modifying a model value",
)
def late_cache(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote) as tracer:
            hidden = model.transformer.h[0].output
            kept = tracer.cache()
    except Exception as error:
        said = caught(error)
    return {"said": said}
