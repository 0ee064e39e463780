"""Prompts and batches."""

from __future__ import annotations

from typing import Any

import torch

from tests.contract.constructs.construct import OTHER, PROMPT, Values, construct


@construct("a list of prompts", "usage/invoke-and-batching", "model.trace([PROMPT, OTHER], remote=True)")
def prompt_list(model: Any, remote: Any) -> Values:
    with model.trace([PROMPT, OTHER], remote=remote):
        last = model.lm_head.output[:, -1].save()
    return {"last": last}


@construct("a prompt in a block of its own", "usage/trace", "with tracer.invoke(PROMPT):")
def explicit_invoke(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:  # noqa: SIM117 (a block inside a block is what is tried)
        with tracer.invoke(PROMPT):
            logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "blocks for several prompts of different lengths",
    "usage/invoke-and-batching",
    "for text in texts:\n    with tracer.invoke(text):",
)
def many_invokes(model: Any, remote: Any) -> Values:
    texts = ["hello", "a small tokenizer", PROMPT]
    with model.trace(remote=remote) as tracer:
        found = list().save()
        for text in texts:
            with tracer.invoke(text):
                found.append(model.lm_head.output[:, -1])
    return {"found": found}


@construct(
    "a block without a prompt that sees the whole batch",
    "usage/invoke-and-batching",
    "with tracer.invoke():\n    model.transformer.h[1].mlp.output[:] = 0",
)
def empty_invoke_changes(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        with tracer.invoke(PROMPT):
            pass
        with tracer.invoke(OTHER):
            pass
        with tracer.invoke():
            model.transformer.h[1].mlp.output[:] = 0
            logits = model.lm_head.output[:, -1].save()
    return {"logits": logits}


@construct("token ids as a list", "models/transformers-model", "model.trace([5, 6, 7], remote=True)")
def token_list(model: Any, remote: Any) -> Values:
    with model.trace([5, 6, 7], remote=remote):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "token ids as lists of several lengths",
    "models/transformers-model",
    "model.trace([[5, 6, 7], [8, 9]], remote=True)",
)
def token_lists(model: Any, remote: Any) -> Values:
    with model.trace([[5, 6, 7], [8, 9]], remote=remote):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("token ids as a tensor", "models/transformers-model", "model.trace(torch.tensor([[5, 6, 7]]), remote=True)")
def token_tensor(model: Any, remote: Any) -> Values:
    with model.trace(torch.tensor([[5, 6, 7]]), remote=remote):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("token ids by name", "models/transformers-model", "model.trace(input_ids=ids, remote=True)")
def ids_by_name(model: Any, remote: Any) -> Values:
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with model.trace(input_ids=ids, remote=remote):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "what a tokenizer returns",
    "models/transformers-model",
    'encoded = model.tokenizer([PROMPT, OTHER], return_tensors="pt", padding=True)\nmodel.trace(encoded, remote=True)',
)
def encoding(model: Any, remote: Any) -> Values:
    encoded = model.tokenizer([PROMPT, OTHER], return_tensors="pt", padding=True)
    with model.trace(encoded, remote=remote):
        last = model.lm_head.output[:, -1].save()
    return {"last": last}


@construct(
    "a dictionary of model inputs",
    "models/transformers-model",
    'model.trace({"input_ids": ids, "attention_mask": mask}, remote=True)',
)
def input_dictionary(model: Any, remote: Any) -> Values:
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.tensor([[0, 1, 1, 1]])
    with model.trace({"input_ids": ids, "attention_mask": mask}, remote=remote):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "an attention mask",
    "models/transformers-model",
    "model.trace(input_ids=ids, attention_mask=mask, remote=True)",
)
def attention_mask(model: Any, remote: Any) -> Values:
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    with model.trace(input_ids=ids, attention_mask=mask, remote=remote):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "embeddings in place of tokens",
    "models/transformers-model",
    "model.trace(inputs_embeds=embeddings, remote=True)",
)
def embeddings_given(model: Any, remote: Any) -> Values:
    embeddings = torch.linspace(-1, 1, 3 * model.config.n_embd).view(1, 3, -1)
    with model.trace(inputs_embeds=embeddings, remote=remote):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "tokens and text in one batch", "usage/invoke-and-batching", "with tracer.invoke(input_ids=torch.tensor([[5, 6]])):"
)
def mixed_invokes(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        with tracer.invoke(PROMPT):
            text = model.lm_head.output[:, -1].save()
        with tracer.invoke(input_ids=torch.tensor([[5, 6]])):
            tokens = model.lm_head.output[:, -1].save()
    return {"text": text, "tokens": tokens}


@construct(
    "arguments of the forward pass",
    "usage/trace",
    "model.trace(PROMPT, output_hidden_states=True, use_cache=False, remote=True)",
)
def forward_arguments(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, output_hidden_states=True, use_cache=False, remote=remote):
        states = model.output.hidden_states.save()
    return {"states": states}


@construct(
    "labels, and the model's own loss",
    "models/transformers-model",
    "model.trace(input_ids=ids, labels=ids, remote=True)",
)
def labels(model: Any, remote: Any) -> Values:
    ids = torch.tensor([[5, 6, 7, 8]])
    with model.trace(input_ids=ids, labels=ids, remote=remote):
        loss = model.output.loss.save()
    return {"loss": loss}


@construct(
    "another padding side, set inside a session",
    "models/transformers-model",
    'model.tokenizer.padding_side = "right"',
)
def padding_side_in_session(model: Any, remote: Any) -> Values:
    before = model.tokenizer.padding_side
    try:
        with model.session(remote=remote):
            model.tokenizer.padding_side = "right"
            with model.trace(["hello", PROMPT]):
                logits = model.lm_head.output.save()
    finally:
        model.tokenizer.padding_side = before
    return {"logits": logits}


@construct(
    "another padding side, set before the trace",
    "models/transformers-model",
    'model.tokenizer.padding_side = "right"',
    differs="The site's own tokenizer is used, as it was loaded: settings of yours do not travel with nnsight. Set it inside a session.",
)
def padding_side(model: Any, remote: Any) -> Values:
    before = model.tokenizer.padding_side
    model.tokenizer.padding_side = "right"
    try:
        with model.trace(["hello", PROMPT], remote=remote):
            logits = model.lm_head.output.save()
    finally:
        model.tokenizer.padding_side = before
    return {"logits": logits}


@construct(
    "chat messages through a template",
    "usage/pipe",
    "encoded = model.tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)",
)
def chat_template(model: Any, remote: Any) -> Values:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    encoded = model.tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
    with model.trace(encoded, remote=remote):
        logits = model.lm_head.output[:, -1].save()
    return {"logits": logits}


@construct("tokenizing inside a session", "remote/remote-session", 'ids = model.tokenizer(PROMPT)["input_ids"]')
def tokenize_in_session(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        ids = model.tokenizer(PROMPT)["input_ids"]
        with model.trace(ids[:3]):
            logits = model.lm_head.output.save()
    return {"logits": logits}


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
