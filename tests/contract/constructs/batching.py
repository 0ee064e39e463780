"""Several prompts, step by step."""

from __future__ import annotations

from typing import Any

import nnsight
import torch

from tests.contract.constructs.construct import OTHER, PROMPT, Values, caught, construct


@construct(
    "steps counted for each block",
    "usage/invoke-and-batching",
    "for _ in tracer.iter[1:3]:",
)
def steps_of_each_block(model: Any, remote: Any) -> Values:
    with model.generate(max_new_tokens=4, min_new_tokens=4, remote=remote) as tracer:
        with tracer.invoke(PROMPT):
            first = nnsight.save([])
            for _ in tracer.iter[1:3]:
                first.append(model.lm_head.output[0][-1].argmax(dim=-1))
        with tracer.invoke(OTHER):
            second = nnsight.save([])
            for _ in tracer.iter[:3]:
                second.append(model.lm_head.output[0][-1].argmax(dim=-1))
    return {"first": first, "second": second}


@construct(
    "means over the real tokens of a padded batch",
    "usage/invoke-and-batching",
    '_, kwargs = model.inputs\nmask = kwargs["attention_mask"]',
)
def masked_means(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:  # noqa: SIM117 (a block inside a trace)
        with tracer.invoke([OTHER, PROMPT]):
            _, kwargs = model.inputs
            mask = kwargs["attention_mask"]
            hidden = model.transformer.h[0].output
            real = mask.to(hidden.device, hidden.dtype).unsqueeze(-1)
            means = ((hidden * real).sum(1) / real.sum(1)).save()
    return {"means": means}


@construct(
    "values kept by what a loop varies",
    "usage/invoke-and-batching",
    "norms[layer] = model.transformer.h[layer].output.norm()",
)
def kept_by_key(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        norms = nnsight.save({})
        for layer in (1, 0):
            with tracer.invoke(PROMPT):
                norms[layer] = model.transformer.h[layer].output.norm()
    return {"norms": norms}


@construct("a value of a block that is read past it", "usage/invoke-and-batching", "total = clean.sum().save()")
def parked_past(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        with tracer.invoke(PROMPT):
            clean = model.transformer.h[0].output
        with tracer.invoke(OTHER):
            model.transformer.h[1].output
            total = clean.sum().save()
    return {"total": total}


@construct(
    "settings of the tokenizer for one block",
    "usage/invoke-and-batching",
    'with tracer.invoke("word " * 50, truncation=True, max_length=4):',
)
def tokenizer_options(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:  # noqa: SIM117 (a block inside a trace)
        with tracer.invoke("word " * 50, truncation=True, max_length=4):
            logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "a list of prompts, generated together",
    "usage/generate",
    "model.generate([OTHER, PROMPT], max_new_tokens=3, remote=True)",
)
def generated_list(model: Any, remote: Any) -> Values:
    with model.generate([OTHER, PROMPT], max_new_tokens=3, remote=remote) as tracer:
        ids = tracer.result.save()
    return {"ids": ids}


@construct(
    "the pipeline over several prompts, with a change at each step",
    "usage/pipe",
    "with model.pipe([OTHER, PROMPT], max_new_tokens=3, do_sample=False, remote=True) as tracer:",
)
def piped_list(model: Any, remote: Any) -> Values:
    with model.pipe([OTHER, PROMPT], max_new_tokens=3, do_sample=False, remote=remote) as tracer:
        for _step in tracer.iter[:2]:
            model.transformer.h[0].output[:, -1] *= 0.5
        records = tracer.result.save()
    return {"records": records}


@construct("a stop in one block ends all", "usage/stop-and-early-exit", "if len(picks) == 2:\n    tracer.stop()")
def stop_in_a_block(model: Any, remote: Any) -> Values:
    with model.generate(max_new_tokens=6, min_new_tokens=6, remote=remote) as tracer:
        with tracer.invoke(PROMPT):
            picks = nnsight.save([])
            for _ in tracer.all():
                picks.append(model.lm_head.output[0, -1].argmax(dim=-1))
                if len(picks) == 2:
                    tracer.stop()
        with tracer.invoke(OTHER):
            others = nnsight.save([])
            for _ in tracer.all():
                others.append(model.lm_head.output[0, -1].argmax(dim=-1))
    return {"picks": picks, "others": others}


@construct(
    "a result asked for after a stop",
    "usage/stop-and-early-exit",
    "tracer.stop()\nresult = tracer.result.save()",
    says="OutOfOrderError: 'result.i0' was requested but the model already ran past it",
)
def result_after_stop(model: Any, remote: Any) -> Values:
    try:
        with model.trace(remote=remote) as tracer:
            with tracer.invoke(PROMPT):
                hidden = model.transformer.h[0].output.save()
                tracer.stop()
            with tracer.invoke():
                result = tracer.result.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct("a barrier for several rounds", "usage/barrier", "meet()\na1 = model.transformer.h[1].output\nmeet()")
def reused_barrier(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(PROMPT):
            a0 = model.transformer.h[0].output
            meet()
            a1 = model.transformer.h[1].output
            meet()
        with tracer.invoke(PROMPT):
            meet()
            h0 = model.transformer.h[0].output
            h0[:, -1] = a0[:, -1] * 2
            meet()
            h1 = model.transformer.h[1].output
            h1[:, -1] += a1[:, -1]
            logits = model.lm_head.output[:, -1].save()
    return {"logits": logits}


@construct(
    "a barrier at each step of a generation",
    "usage/barrier",
    "for _step in tracer.iter[:3]:\n    shared = model.transformer.h[0].output[:, -1]\n    meet()",
)
def barrier_at_steps(model: Any, remote: Any) -> Values:
    with model.generate(max_new_tokens=3, min_new_tokens=3, remote=remote) as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(PROMPT):
            for _step in tracer.iter[:3]:
                shared = model.transformer.h[0].output[:, -1]
                meet()
        with tracer.invoke(PROMPT):
            for _step in tracer.iter[:3]:
                meet()
                model.transformer.h[1].output[:, -1] = shared
        with tracer.invoke():
            ids = tracer.result.save()
    return {"ids": ids}


@construct(
    "a barrier that one block never reaches",
    "usage/barrier",
    "meet = tracer.barrier(3)",
    says="ValueError: A barrier was never reached by every block it waits for; check the count it was created with",
)
def missed_barrier(model: Any, remote: Any) -> Values:
    try:
        with model.trace(remote=remote) as tracer:
            meet = tracer.barrier(3)
            with tracer.invoke(PROMPT):
                hidden = model.transformer.h[0].output
                meet()
            with tracer.invoke(OTHER):
                meet()
                logits = model.lm_head.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "a skip in one block of two",
    "usage/skip",
    "model.transformer.h[1].skip(model.transformer.h[1].input)",
    says="ValueError: A batched `.skip()` has to cover every row: skip the module in every invoke, or none — a shared forward "
    "can't run for only the rows an invoke left unskipped.",
)
def partial_skip(model: Any, remote: Any) -> Values:
    try:
        with model.trace(remote=remote) as tracer:
            with tracer.invoke(PROMPT):
                model.transformer.h[1].skip(model.transformer.h[1].input)
            with tracer.invoke(OTHER):
                logits = model.lm_head.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "chat messages, with the tokenizer's own template",
    "models/transformers-model",
    'messages = [{"role": "user", "content": "hello"}]\nwith model.trace(messages):',
    note="where the site's tokenizer has a template; here one is set in the session",
)
def chat_messages(model: Any, remote: Any) -> Values:
    messages = [{"role": "user", "content": "hello"}]
    before = model.tokenizer.chat_template
    try:
        with model.session(remote=remote):
            model.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            with model.trace(messages):
                logits = model.lm_head.output[:, -1].save()
    finally:
        model.tokenizer.chat_template = before
    return {"logits": logits}


@construct(
    "an encoding unpacked into names, and one row of ids",
    "models/transformers-model",
    "with model.trace(**encoded, remote=True):\nwith model.trace(torch.tensor([5, 6, 7]), remote=True):",
)
def unpacked(model: Any, remote: Any) -> Values:
    encoded = model.tokenizer(PROMPT, return_tensors="pt")
    with model.trace(**encoded, remote=remote):
        logits = model.lm_head.output.save()
    with model.trace(torch.tensor([5, 6, 7]), remote=remote):
        row = model.lm_head.output.save()
    return {"logits": logits, "row": row}


@construct(
    "labels and positions of your own",
    "models/transformers-model",
    "model.trace([5, 6, 7], labels=[5, 6, 7], position_ids=[3, 4, 5], remote=True)",
)
def labels_and_positions(model: Any, remote: Any) -> Values:
    with model.trace([5, 6, 7], labels=[5, 6, 7], position_ids=[3, 4, 5], remote=remote):
        loss = model.output.loss.save()
    return {"loss": loss}


@construct(
    "embeddings in place of tokens, for a generation",
    "models/transformers-model",
    "with model.generate(inputs_embeds=embeddings, max_new_tokens=3, remote=True) as tracer:",
)
def generated_from_embeddings(model: Any, remote: Any) -> Values:
    torch.manual_seed(0)
    embeddings = torch.randn(1, 4, model.config.n_embd)
    with model.generate(inputs_embeds=embeddings, max_new_tokens=3, remote=remote) as tracer:
        ids = tracer.result.save()
    return {"ids": ids}


@construct(
    "chat messages through the pipeline",
    "usage/pipe",
    "with model.pipe(messages, max_new_tokens=2, do_sample=False) as tracer:",
    note="where the site's tokenizer has a template; here one is set in the session",
)
def piped_chat(model: Any, remote: Any) -> Values:
    messages = [{"role": "user", "content": "hello"}]
    before = model.tokenizer.chat_template
    try:
        with model.session(remote=remote):
            model.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            with model.pipe(messages, max_new_tokens=2, do_sample=False) as tracer:
                records = tracer.result
            kept = nnsight.save(records)
    finally:
        model.tokenizer.chat_template = before
    return {"kept": kept}
