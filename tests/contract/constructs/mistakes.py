"""Mistakes, and what is said."""

from __future__ import annotations

from typing import Any

import nnsight

from tests.contract.constructs.construct import OTHER, PROMPT, Values, caught, construct


@construct(
    "an error of your own",
    "errors/index",
    'raise ValueError("the norm is too large")',
    note="with your file, line and code, and no line of the mesh",
    says="ValueError: the norm is too large",
)
def own_error(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            if model.transformer.h[0].output.norm() > 0:
                raise ValueError("the norm is too large")
            logits = model.lm_head.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "an assertion that fails",
    "errors/index",
    "assert model.lm_head.output.shape[0] == 2",
    says="AssertionError: two rows are needed",
)
def failed_assertion(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            assert model.lm_head.output.shape[0] == 2, "two rows are needed"
            logits = model.lm_head.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "an index out of range",
    "errors/index",
    "model.transformer.h[0].output[:, 10_000] = 0",
    says="IndexError: index 10000 is out of bounds for dimension 1 with size 8",
)
def index_error(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            model.transformer.h[0].output[:, 10_000] = 0
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "a module that does not exist",
    "errors/index",
    "model.transformer.nothing.output.save()",
    says="AttributeError: 'Envoy' object (nor its module) has attribute 'nothing'",
)
def no_such_module(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            value = model.transformer.nothing.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "values asked for in the wrong order",
    "errors/out-of-order-error",
    "later = model.transformer.h[1].output.save()\nearlier = model.transformer.h[0].output.save()",
    says="OutOfOrderError: 'model.transformer.h.0.output.i0' was requested but the model already ran past it",
)
def wrong_order(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            later = model.transformer.h[1].output.save()
            earlier = model.transformer.h[0].output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "a module that does not run",
    "errors/module-never-fired",
    "model.transformer.h[1].skip(first)\ninner = model.transformer.h[1].mlp.output.save()",
    says="OutOfOrderError: 'model.transformer.h.1.mlp.output.i0' was requested but the model already ran past it",
)
def never_run(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            first = model.transformer.h[0].output
            model.transformer.h[1].skip(first)
            inner = model.transformer.h[1].mlp.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "a trace without a prompt",
    "errors/cannot-access-outside-interleaving",
    "with model.trace(remote=True):",
    says="ValueError: Cannot access `model.lm_head.output` outside of interleaving",
)
def no_prompt(model: Any, remote: Any) -> Values:
    try:
        with model.trace(remote=remote):
            logits = model.lm_head.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "a block inside a block",
    "errors/invoke-during-execution",
    "with tracer.invoke(PROMPT):\n    with tracer.invoke(OTHER):",
    says="ValueError: Cannot invoke while the model is already running.",
)
def nested_invokes(model: Any, remote: Any) -> Values:
    said = "nothing"
    try:
        with model.trace(remote=remote) as tracer:  # noqa: SIM117 (one block inside another is what is tried)
            with tracer.invoke(PROMPT):
                with tracer.invoke(OTHER):
                    logits = model.lm_head.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "writing into a tuple",
    "usage/access-and-modify",
    "model.transformer.h[0].attn.output[0] = zeros",
    says="TypeError: 'tuple' object does not support item assignment",
)
def tuple_item(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            zeros = 0 * model.transformer.h[0].attn.input
            model.transformer.h[0].attn.output[0] = zeros
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "a value of another block, without the barrier that it needs",
    "usage/invoke-and-batching",
    "model.transformer.h[1].output[:, -1] = clean",
    says="NameError: name 'clean' is not defined",
)
def missing_barrier(model: Any, remote: Any) -> Values:
    try:
        with model.trace(remote=remote) as tracer:
            with tracer.invoke(PROMPT):
                clean = model.transformer.h[1].output[:, -1].clone()
            with tracer.invoke(OTHER):
                model.transformer.h[1].output[:, -1] = clean
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "statements after an open loop",
    "usage/iteration",
    "for _step in tracer.iter[:]:\nlate = nnsight.save(1)",
    note="nnsight warns, and what follows the loop does not run",
)
def after_an_open_loop(model: Any, remote: Any) -> Values:
    late = 0
    with model.generate(PROMPT, max_new_tokens=3, remote=remote) as tracer:
        tokens = list().save()
        for _step in tracer.iter[:]:
            tokens.append(model.lm_head.output[0, -1].argmax())
        late = nnsight.save(1)
    return {"tokens": tokens, "late": late}


@construct(
    "an output outside a trace",
    "errors/cannot-access-outside-interleaving",
    "model.transformer.h[0].output",
    note="said by nnsight before anything is sent",
    says="ValueError: Cannot access `model.transformer.h.0.output` outside of interleaving",
)
def outside(model: Any, remote: Any) -> Values:
    try:
        model.transformer.h[0].output
    except Exception as error:
        said = caught(error)
    return {"said": said}
