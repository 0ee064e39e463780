"""Edits and caches."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.contract.constructs.construct import OTHER, PROMPT, Values, construct


@construct(
    "an edit of the model itself, and clear_edits", "usage/edit", "with model.edit(inplace=True):\nmodel.clear_edits()"
)
def edit_in_place(model: Any, remote: Any) -> Values:
    with model.edit(inplace=True):
        model.transformer.h[1].output[:] = 0
    with model.trace(PROMPT, remote=remote):
        edited = model.lm_head.output.save()
    model.clear_edits()
    with model.trace(PROMPT, remote=remote):
        plain = model.lm_head.output.save()
    return {"edited": edited, "plain": plain}


@construct(
    "edits that add up", "usage/edit", "with model.edit() as (_tracer, once):\nwith once.edit() as (_again, twice):"
)
def edits_add_up(model: Any, remote: Any) -> Values:
    with model.edit() as (_tracer, once):
        once.transformer.h[0].mlp.output[:] = 0
    with once.edit() as (_again, twice):
        twice.transformer.h[1].mlp.output[:] = 0
    with twice.trace(PROMPT, remote=remote):
        logits = twice.lm_head.output.save()
    return {"logits": logits}


@construct(
    "an edit with a captured value", "walkthrough, persistent edits", "edited.transformer.h[-1].output[:, -1] = hidden"
)
def edit_with_value(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT):
        hidden = model.transformer.h[-1].output[:, -1].save()
    with model.edit() as (_tracer, edited):
        edited.transformer.h[-1].output[:, -1] = hidden
    with edited.trace("hello world", remote=remote):
        logits = edited.lm_head.output[:, -1].save()
    return {"logits": logits}


@construct(
    "an edit at every step of a generation",
    "usage/edit",
    "for _step in tracer.iter[:]:\n    edited.transformer.h[0].output[:, -1] *= 0.5",
    refused="'NoneType' object has no attribute 'f_code'",
    note="nnsight cannot send an edit that names its own tracer; write `edited.iter[:]`, as in the next row",
)
def edit_in_generation(model: Any, remote: Any) -> Values:
    with model.edit() as (tracer, edited):
        for _step in tracer.iter[:]:
            edited.transformer.h[0].output[:, -1] *= 0.5
    with edited.generate(PROMPT, max_new_tokens=4, remote=remote) as running:
        ids = running.result.save()
    return {"ids": ids}


@construct(
    "an edit at every step of a generation, without its tracer",
    "reference/api-quick-reference",
    "for _step in edited.iter[:]:\n    edited.transformer.h[0].output[:, -1] *= 0.5",
)
def edit_in_generation_by_model(model: Any, remote: Any) -> Values:
    with model.edit() as (_tracer, edited):
        for _step in edited.iter[:]:
            edited.transformer.h[0].output[:, -1] *= 0.5
    with edited.generate(PROMPT, max_new_tokens=4, remote=remote) as running:
        ids = running.result.save()
    return {"ids": ids}


@construct(
    "an edit that skips a layer",
    "usage/skip, persistent skip",
    "edited.transformer.h[1].skip(edited.transformer.h[1].input)",
)
def edit_that_skips(model: Any, remote: Any) -> Values:
    with model.edit() as (_tracer, edited):
        edited.transformer.h[1].skip(edited.transformer.h[1].input)
    with edited.trace(PROMPT, remote=remote):
        logits = edited.lm_head.output.save()
    return {"logits": logits}


@construct("a cache of every module", "usage/cache", "kept = tracer.cache()")
def cache_everything(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote) as tracer:
        kept = tracer.cache()
    names = sorted(kept.keys())
    return {
        "names": names,
        "hidden": kept["model.transformer.h.0"].output,
        "norm": kept["model.transformer.ln_f"].output,
    }


@construct(
    "a cache of some modules, by object and by name",
    "usage/cache",
    'tracer.cache(modules=[model.transformer.h[0], "model.lm_head"])',
)
def cache_some(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote) as tracer:
        kept = tracer.cache(modules=[model.transformer.h[0], "model.lm_head"])
    return {"names": sorted(kept.keys()), "logits": kept["model.lm_head"].output}


@construct(
    "a cache's storage options",
    "usage/cache",
    "tracer.cache(dtype=torch.float16, device=None, detach=True, include_output=False, include_inputs=True)",
)
def cache_options(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote) as tracer:
        kept = tracer.cache(dtype=torch.float16, device=None, detach=True, include_output=False, include_inputs=True)
    entry = kept["model.lm_head"]
    return {"given": entry.input, "output": entry.output}


@construct(
    "reading a cache by walking",
    "usage/cache",
    "kept.transformer.h[0].output",
    note="by number from the front; for `[-1]` set `kept._cache.model = model` first",
)
def cache_walk(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote) as tracer:
        kept = tracer.cache()
    return {"hidden": kept.transformer.h[0].output, "head": kept.lm_head.output}


@construct("a cache over the steps of a generation", "usage/cache", 'steps = kept["model.transformer.h.1"].output')
def cache_of_steps(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=3, remote=remote) as tracer:
        kept = tracer.cache(modules=[model.transformer.h[1]])
    steps = kept["model.transformer.h.1"].output
    return {"steps": steps}


@construct(
    "a cache sees changes",
    "usage/cache",
    "kept = tracer.cache(modules=[model.transformer.h[0]])\nmodel.transformer.h[0].output[:] = 0",
)
def cache_after_changes(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote) as tracer:
        kept = tracer.cache(modules=[model.transformer.h[0]])
        model.transformer.h[0].output[:] = 0
    return {"hidden": kept["model.transformer.h.0"].output}


@construct(
    "a cache of one block's rows",
    "usage/cache",
    "with tracer.invoke(OTHER):\n    kept = tracer.cache(modules=[model.lm_head])",
)
def cache_in_a_block(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        with tracer.invoke(PROMPT):
            first = model.lm_head.output.save()
        with tracer.invoke(OTHER):
            kept = tracer.cache(modules=[model.lm_head])
    return {"first": first, "paths": list(kept.keys()), "rows": kept["model.lm_head"].output}


@construct("a cache kept in a file", "usage/cache", "torch.save(kept, path)\nback._cache.model = model")
def cache_in_a_file(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote) as tracer:
        kept = tracer.cache(modules=[model.transformer.h[0]])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.pt"
        torch.save(kept, path)
        back = torch.load(path, weights_only=False)
    by_path = back["model.transformer.h.0"].output
    back._cache.model = model
    return {"by_path": by_path, "by_walking": back.transformer.h[0].output}


@construct(
    "a backward pass over a cache",
    "usage/cache",
    "kept = tracer.cache(modules=[model.transformer.h[0]], detach=False, device=None)",
    differs="Values come back without the graph that made them, so the pass ends at the cache. Write the backward pass in the trace.",
)
def cache_with_graph(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote) as tracer:
        kept = tracer.cache(modules=[model.transformer.h[0]], detach=False, device=None)
    kept["model.transformer.h.0"].output.sum().backward()
    reached = model.transformer.wte._module.weight.grad is not None
    model._module.zero_grad()
    return {"reached": reached}


@construct(
    "an edit in a generation and in the pipeline",
    "usage/edit",
    "with edited.pipe(PROMPT, max_new_tokens=3, do_sample=False, remote=True) as tracer:",
    note="at the first step only, as in nnsight",
)
def edit_at_the_first_step(model: Any, remote: Any) -> Values:
    with model.edit() as (_tracer, edited):
        edited.transformer.h[0].output[:] = 0
    with edited.generate(PROMPT, max_new_tokens=3, remote=remote) as tracer:
        ids = tracer.result.save()
    with edited.pipe(PROMPT, max_new_tokens=3, do_sample=False, remote=remote) as tracer:
        records = tracer.result.save()
    return {"ids": ids, "records": records}


@construct(
    "an edit of one layer, which is not the model's",
    "usage/edit",
    "with model.transformer.h[0].edit(inplace=True):",
    note="a trace of the model does not replay it",
)
def edit_of_a_layer(model: Any, remote: Any) -> Values:
    with model.transformer.h[0].edit(inplace=True):
        model.transformer.h[0].mlp.output[:] = 0
    with model.trace(PROMPT, remote=remote):
        logits = model.lm_head.output.save()
    model.transformer.h[0].clear_edits()
    return {"logits": logits}
