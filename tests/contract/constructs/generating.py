"""Generating text."""

from __future__ import annotations

from typing import Any

import nnsight
import torch
from transformers import GenerationConfig

from tests.contract.constructs.construct import OTHER, PROMPT, Values, construct


@construct("the generated tokens", "usage/generate", "ids = tracer.result.save()")
def result(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=5, remote=remote) as tracer:
        ids = tracer.result.save()
    return {"ids": ids}


@construct(
    "a value without a loop is the first step's", "usage/generate", "hidden = model.transformer.h[-1].output.save()"
)
def first_step(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=3, remote=remote) as tracer:
        hidden = model.transformer.h[-1].output.save()
        ids = tracer.result.save()
    return {"hidden": hidden, "ids": ids}


@construct(
    "every step, with its number",
    "usage/iteration",
    "for step in tracer.iter[:]:\n    steps.append((step, model.lm_head.output[0, -1].argmax()))",
)
def every_step(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, remote=remote) as tracer:
        steps = list().save()
        for step in tracer.iter[:]:
            steps.append((step, model.lm_head.output[0, -1].argmax()))
    return {"steps": steps}


@construct("tracer.all()", "usage/iteration", "for _step in tracer.all():\n    model.transformer.h[0].output[:] = 0")
def all_steps(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, remote=remote) as tracer:
        states = list().save()
        for _step in tracer.all():
            model.transformer.h[0].output[:] = 0
            states.append(model.transformer.h[-1].output)
    return {"states": states}


@construct("a slice of the steps", "usage/iteration", "for _step in tracer.iter[1:3]:")
def slice_of_steps(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, remote=remote) as tracer:
        found = list().save()
        for _step in tracer.iter[1:3]:
            found.append(model.lm_head.output)
    return {"found": found}


@construct("one step", "usage/iteration", "for _step in tracer.iter[2]:\n    third = model.lm_head.output.save()")
def one_step(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, remote=remote) as tracer:
        for _step in tracer.iter[2]:
            third = model.lm_head.output.save()
    return {"third": third}


@construct("chosen steps", "usage/iteration", "for _step in tracer.iter[[0, 2, 3]]:")
def chosen_steps(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, remote=remote) as tracer:
        found = list().save()
        for _step in tracer.iter[[0, 2, 3]]:
            found.append(model.lm_head.output[0, -1])
    return {"found": found}


@construct("a change at one step only", "usage/iteration", "if step == 2:\n    model.transformer.h[0].output[:] = 0")
def change_at_a_step(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=5, remote=remote) as tracer:
        tokens = nnsight.save([])
        for step in tracer.iter[:5]:
            if step == 2:
                model.transformer.h[0].output[:] = 0
            tokens.append(model.output.logits[0, -1].argmax(-1))
    return {"tokens": tokens}


@construct("steering at every step", "patterns/steering", "model.transformer.h[0].output[:, -1] += direction")
def steer_every_step(model: Any, remote: Any) -> Values:
    direction = torch.linspace(-4, 4, model.config.n_embd)
    with model.generate(PROMPT, max_new_tokens=5, remote=remote) as tracer:
        for _step in tracer.iter[:5]:
            model.transformer.h[0].output[:, -1] += direction
        ids = tracer.result.save()
    return {"ids": ids}


@construct("more steps asked for than there are", "usage/iteration", "for _step in tracer.iter[:9]:")
def too_many_steps(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=3, remote=remote) as tracer:
        tokens = list().save()
        for _step in tracer.iter[:9]:
            tokens.append(model.lm_head.output[0, -1].argmax())
    return {"tokens": tokens}


@construct(
    "values after a loop, in a block without a prompt",
    "usage/iteration",
    "with tracer.invoke():\n    ids = tracer.result.save()",
)
def after_the_loop(model: Any, remote: Any) -> Values:
    with model.generate(max_new_tokens=3, remote=remote) as tracer:
        with tracer.invoke(PROMPT):
            states = list().save()
            for _step in tracer.iter[:]:
                states.append(model.transformer.h[-1].output)
        with tracer.invoke():
            ids = tracer.result.save()
    return {"states": states, "ids": ids}


@construct(
    "several prompts at once",
    "usage/invoke-and-batching",
    "with model.generate(max_new_tokens=3, remote=True) as tracer:",
)
def generate_in_batch(model: Any, remote: Any) -> Values:
    with model.generate(max_new_tokens=3, remote=remote) as tracer:
        with tracer.invoke(PROMPT):
            one = model.lm_head.output[:, -1].save()
        with tracer.invoke([OTHER, "a small tokenizer"]):
            two = model.lm_head.output[:, -1].save()
        with tracer.invoke():
            ids = tracer.result.save()
    return {"one": one, "two": two, "ids": ids}


@construct(
    "sampling with a seed set in the block",
    "usage/generate",
    "torch.manual_seed(7)\nmodel.generate(PROMPT, max_new_tokens=6, do_sample=True, temperature=0.9, top_k=20, remote=True)",
)
def sampling(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=6, do_sample=True, temperature=0.9, top_k=20, remote=remote) as tracer:
        torch.manual_seed(7)
        ids = tracer.result.save()
    return {"ids": ids}


@construct(
    "beam search",
    "usage/generate",
    "model.generate(PROMPT, max_new_tokens=4, num_beams=3, remote=True)",
)
def beams(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=4, num_beams=3, remote=remote) as tracer:
        ids = tracer.result.save()
    return {"ids": ids}


@construct("several sequences for one prompt", "usage/generate", "num_return_sequences=2")
def several_sequences(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=4, num_beams=2, num_return_sequences=2, remote=remote) as tracer:
        ids = tracer.result.save()
    return {"ids": ids}


@construct(
    "a generation config",
    "usage/generate",
    "model.generate(PROMPT, generation_config=config, remote=True)",
)
def generation_config(model: Any, remote: Any) -> Values:
    config = GenerationConfig(max_new_tokens=4, do_sample=False, repetition_penalty=1.3, pad_token_id=0)
    with model.generate(PROMPT, generation_config=config, remote=remote) as tracer:
        ids = tracer.result.save()
    return {"ids": ids}


@construct(
    "scores and hidden states of the generation",
    "usage/generate",
    "return_dict_in_generate=True, output_scores=True",
)
def generation_details(model: Any, remote: Any) -> Values:
    with model.generate(
        PROMPT, max_new_tokens=3, return_dict_in_generate=True, output_scores=True, remote=remote
    ) as tracer:
        scores = tracer.result.scores.save()
        ids = tracer.result.sequences.save()
    return {"scores": scores, "ids": ids}


@construct(
    "stopping words and least lengths",
    "usage/generate",
    "model.generate(PROMPT, max_new_tokens=6, min_new_tokens=2, eos_token_id=list(range(1, 400)), remote=True)",
)
def stop_tokens(model: Any, remote: Any) -> Values:
    with model.generate(
        PROMPT, max_new_tokens=6, min_new_tokens=2, eos_token_id=list(range(1, 400)), remote=remote
    ) as tracer:
        ids = tracer.result.save()
    return {"ids": ids}


@construct("stopping the generation from the block", "usage/stop-and-early-exit", "if step == 2:\n    tracer.stop()")
def stop_generation(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=9, remote=remote) as tracer:
        tokens = list().save()
        for step in tracer.iter[:]:
            tokens.append(model.lm_head.output[0, -1].argmax())
            if step == 2:
                tracer.stop()
    return {"tokens": tokens}


@construct(
    "stopping a forward pass early",
    "usage/stop-and-early-exit",
    "hidden = model.transformer.h[0].output.save()\ntracer.stop()",
)
def stop_early(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote) as tracer:
        hidden = model.transformer.h[0].output.save()
        tracer.stop()
    return {"hidden": hidden}


@construct(
    "each token as it is made",
    "usage/generate",
    "tokens.append(model.generator.streamer.output)",
)
def streamer(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3, remote=remote) as tracer:
        tokens = list().save()
        for _step in tracer.iter[:4]:
            tokens.append(model.generator.streamer.output)
    return {"tokens": tokens}


@construct("the finished ids the older way", "usage/generate", "ids = model.generator.output.save()")
def generator_output(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=3, remote=remote):
        ids = model.generator.output.save()
    return {"ids": ids}


@construct("the older form of the loop", "reference/migrating-to-0.8", "with tracer.iter[:3]:")
def iteration_block(model: Any, remote: Any) -> Values:
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3, remote=remote) as tracer:
        tokens = list().save()
        with tracer.iter[:3]:
            tokens.append(model.lm_head.output[0, -1].argmax())
    return {"tokens": tokens}


@construct("the whole pipeline of the task", "usage/pipe", "out = tracer.result.save()")
def pipe(model: Any, remote: Any) -> Values:
    with model.pipe(PROMPT, max_new_tokens=3, do_sample=False, remote=remote) as tracer:
        hidden = model.transformer.h[0].output.save()
        out = tracer.result.save()
    return {"hidden": hidden, "out": out}


@construct(
    "generation inside a session", "patterns/steering", "with model.generate(OTHER, max_new_tokens=3) as tracer:"
)
def generate_in_session(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        with model.trace(PROMPT):
            hidden = model.transformer.h[0].output[:, -1]
        with model.generate(OTHER, max_new_tokens=3) as tracer:
            model.transformer.h[0].output[:, -1] = hidden
            ids = tracer.result.save()
    return {"ids": ids}
