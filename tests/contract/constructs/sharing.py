"""Values between prompts and between traces."""

from __future__ import annotations

from typing import Any

import torch

from tests.contract.constructs.construct import OTHER, PROMPT, Values, construct


@construct("a value of an earlier block, without a barrier", "usage/invoke-and-batching", "later[:, -1] = taken")
def cross_invoke(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        with tracer.invoke(PROMPT):
            taken = model.transformer.h[0].output[:, -1]
        with tracer.invoke(PROMPT):
            later = model.transformer.h[1].output
            later[:, -1] = taken
            logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "embeddings patched into another prompt",
    "usage/barrier",
    "meet = tracer.barrier(2)\nmodel.transformer.wte.output = embeddings",
)
def patched_embeddings(model: Any, remote: Any) -> Values:
    with model.generate(max_new_tokens=3, remote=remote) as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke([5, 6, 7, 8]):
            embeddings = model.transformer.wte.output
            meet()
        with tracer.invoke([9, 9, 9, 9]):
            meet()
            model.transformer.wte.output = embeddings
        with tracer.invoke():
            ids = tracer.result.save()
    return {"ids": ids}


@construct("a barrier of three blocks", "usage/barrier", "meet = tracer.barrier(3)")
def three_at_a_barrier(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        meet = tracer.barrier(3)
        with tracer.invoke([5, 6]):
            one = model.transformer.h[0].output[:, -1]
            meet()
        with tracer.invoke([7, 8]):
            two = model.transformer.h[0].output[:, -1]
            meet()
        with tracer.invoke([9, 9]):
            meet()
            model.transformer.h[0].output[:, -1] = (one + two) / 2
            logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "one list filled by several blocks",
    "usage/invoke-and-batching",
    "found.append(model.lm_head.output[:, -1].argmax(-1))",
)
def shared_list(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        found = list().save()
        for text in (PROMPT, OTHER):
            with tracer.invoke(text):
                found.append(model.lm_head.output[:, -1].argmax(-1))
    return {"found": found}


@construct("a loop of traces in a session", "usage/session", "for text in texts:\n    with model.trace(text):")
def session_loop(model: Any, remote: Any) -> Values:
    texts = [PROMPT, OTHER, "a small tokenizer"]
    with model.session(remote=remote):
        results = list().save()
        for text in texts:
            with model.trace(text):
                results.append(model.lm_head.output[0, -1].argmax(dim=-1))
    return {"results": results}


@construct(
    "activations used across traces without save()", "remote/remote-session", "model.transformer.h[0].output = hidden"
)
def session_values(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        with model.trace(PROMPT):
            hidden = model.transformer.h[0].output
        with model.trace(PROMPT):
            model.transformer.h[0].output = hidden * 0.5
            out = model.lm_head.output.save()
    return {"out": out}


@construct("Python between the traces of a session", "usage/session", "if first.norm() > second.norm():")
def session_python(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        with model.trace(PROMPT):
            first = model.transformer.h[0].output[:, -1]
        with model.trace(OTHER):
            second = model.transformer.h[0].output[:, -1]
        if first.norm() > second.norm():
            first, second = second, first
        ratio = (first.norm() / second.norm()).save()
    return {"ratio": ratio}


@construct("batches and barriers in a session", "remote/remote-session", "with model.trace() as tracer:")
def session_batches(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        with model.trace() as tracer:
            meet = tracer.barrier(2)
            with tracer.invoke(PROMPT):
                taken = model.transformer.h[0].output[:, -1]
                meet()
            with tracer.invoke(OTHER):
                meet()
                model.transformer.h[0].output[:, -1] = taken
                patched = model.lm_head.output[:, -1]
        with model.trace(OTHER):
            difference = (model.lm_head.output[:, -1] - patched).norm().save()
    return {"difference": difference}


@construct(
    "a remote value in a later local trace",
    "usage/save",
    "with model.trace(OTHER):\n    model.transformer.h[0].output[:, -1] = hidden",
)
def remote_then_local(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output[:, -1].save()
    with model.trace(OTHER):
        model.transformer.h[0].output[:, -1] = hidden
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("a local value in a later remote trace", "usage/save", "model.transformer.h[0].output[:, -1] = hidden")
def local_then_remote(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT):
        hidden = model.transformer.h[0].output[:, -1].save()
    with model.trace(OTHER, remote=remote):
        model.transformer.h[0].output[:, -1] = hidden
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "remote traces inside a local session",
    "usage/session",
    "with model.session():\n    with model.trace(PROMPT, remote=True):",
    note="one job a trace; `remote=True` on the session makes it one job",
)
def remote_in_local_session(model: Any, remote: Any) -> Values:
    with model.session():
        with model.trace(PROMPT, remote=remote):
            hidden = model.transformer.h[0].output.save()
        doubled = (hidden * 2).save()
    return {"doubled": doubled}


@construct(
    "remote=True on traces inside a remote session",
    "remote/remote-session",
    "with model.session(remote=True):\n    with model.trace(PROMPT, remote=True):",
    note="needless, and harmless: the code is at the site already",
)
def remote_in_remote_session(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        with model.trace(PROMPT, remote=remote):
            hidden = model.transformer.h[0].output
        with model.trace(OTHER, remote=remote):
            model.transformer.h[0].output[:, -1] = hidden[:, -1]
            logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "a list of yours, from before the block, filled in it",
    "remote/remote-trace",
    "mine: list[torch.Tensor] = []\nmine.append(model.lm_head.output.argmax(-1))",
    differs="The list that is filled is the site's copy; yours stays empty. Make it in the block: `found = list().save()`.",
)
def list_from_before(model: Any, remote: Any) -> Values:
    mine: list[torch.Tensor] = []
    with model.trace(PROMPT, remote=remote):
        mine.append(model.lm_head.output.argmax(-1))
        logits = model.lm_head.output.save()
    return {"mine": mine}
