"""Mistakes, and what is said."""

from __future__ import annotations

from typing import Any

from tests.contract.constructs.construct import PROMPT, Values, caught, construct


@construct(
    "an error of your own",
    "errors",
    'raise ValueError("the norm is too large")',
    note="with your file, line and code, and no line of the mesh",
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


@construct("an assertion that fails", "errors", "assert model.lm_head.output.shape[0] == 2")
def failed_assertion(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            assert model.lm_head.output.shape[0] == 2, "two rows are needed"
            logits = model.lm_head.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct("an index out of range", "walkthrough, error handling", "model.transformer.h[0].output[:, 10_000] = 0")
def index_error(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            model.transformer.h[0].output[:, 10_000] = 0
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct("a module that does not exist", "errors", "model.transformer.nothing.output.save()")
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
)
def wrong_order(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            later = model.transformer.h[1].output.save()
            earlier = model.transformer.h[0].output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}
