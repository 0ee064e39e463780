"""Gradients: other ways, and limits."""

from __future__ import annotations

from typing import Any

import nnsight
import torch

from tests.contract.constructs.construct import OTHER, PROMPT, Values, caught, construct


@construct(
    "gradients kept by torch, read in any order",
    "usage/backward-and-grad",
    "hidden.retain_grad()\nloss.backward()",
)
def retained(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        states = []
        for layer in model.transformer.h:
            hidden = layer.output
            hidden.retain_grad()
            states.append(hidden)
        loss = model.output.logits.sum()
        loss.backward()
        norms = nnsight.save([state.grad.norm().item() for state in states])
    return {"norms": norms}


@construct(
    "a plain backward pass after the trace",
    "usage/backward-and-grad",
    "refs = nnsight.save([])\nhidden.retain_grad()",
    refused="'NoneType' object has no attribute 'norm'",
    note="values come back without the graph that made them: call `loss.backward()` in the trace",
)
def retained_afterwards(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        refs = nnsight.save([])
        for layer in model.transformer.h:
            hidden = layer.output
            hidden.retain_grad()
            refs.append(hidden)
        loss = model.output.logits.sum().save()
    loss.backward()
    return {"norms": [ref.grad.norm().item() for ref in refs]}


@construct(
    "gradients at each token, by traces over the growing text",
    "usage/backward-and-grad",
    "tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=-1)",
)
def growing_text(model: Any, remote: Any) -> Values:
    tokens = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    with model.session(remote=remote):
        grads = nnsight.save([])
        for _step in range(2):
            with model.trace(tokens):
                hidden = model.transformer.h[-1].output
                logits = model.output.logits
                with logits[0, -1].max().backward():
                    grad = hidden.grad.norm()
            grads.append(grad)
            tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=-1)
    return {"grads": grads}


@construct(
    "the gradient of a vector that is added",
    "usage/backward-and-grad",
    "vector = torch.zeros(hidden.shape[-1]).requires_grad_(True)",
)
def added_vector(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        vector = torch.zeros(hidden.shape[-1]).requires_grad_(True)
        model.transformer.h[0].output = hidden + vector
        with model.output.logits[:, -1, 7].sum().backward():
            gradient = vector.grad.save()
    return {"gradient": gradient}


@construct(
    "a frozen model",
    "usage/backward-and-grad",
    "parameter.requires_grad_(False)",
    says="NotImplementedError: This tensor does not require grad, so a backward session cannot produce gradients: nothing the block "
    "reads can ever receive one. The forward ran without gradient tracking (e.g. under torch.no_grad()), or the tensor was created "
    "without requires_grad=True.",
)
def frozen(model: Any, remote: Any) -> Values:
    try:
        with model.session(remote=remote):
            for parameter in model._module.parameters():
                parameter.requires_grad_(False)
            with model.trace(PROMPT):
                hidden = model.transformer.h[0].output
                with model.output.logits.sum().backward():
                    gradient = hidden.grad.save()
    except Exception as error:
        said = caught(error)
    finally:
        if not remote:
            for parameter in model._module.parameters():
                parameter.requires_grad_(True)
    return {"said": said}


@construct(
    "a tensor of yours, and its gradient, between traces",
    "usage/backward-and-grad, standalone backward",
    "with loss.backward():\n    gradient = point.grad.save()",
)
def plain_tensors(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        with model.trace(PROMPT):
            start = model.transformer.h[0].output[0, -1].detach()
        point = start.clone().requires_grad_(True)
        loss = (point * point).sum()
        with loss.backward():
            gradient = point.grad.save()
    return {"gradient": gradient}


@construct(
    "a change in place after the model has moved on",
    "usage/backward-and-grad",
    "later = model.transformer.h[1].output\nhidden *= 2",
    says="RuntimeError: one of the variables needed for gradient computation has been modified by an inplace operation",
)
def late_change(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            hidden = model.transformer.h[0].output
            later = model.transformer.h[1].output
            hidden *= 2
            with model.output.logits.sum().backward():
                gradient = later.grad.norm().save()
    except Exception as error:
        said = caught(error).partition(": [")[0]
    return {"said": said}


@construct(
    "activations for a probe, without gradients",
    "patterns/probing",
    "with torch.no_grad():\n    with model.trace([PROMPT, OTHER], remote=True):",
)
def activations_for_a_probe(model: Any, remote: Any) -> Values:
    with torch.no_grad():  # noqa: SIM117 (as the page writes it)
        with model.trace([PROMPT, OTHER], remote=remote):
            activations = nnsight.save([block.output[:, -1, :].detach().cpu().float() for block in model.transformer.h])
    return {"activations": activations}


@construct(
    "no_grad around the block, as the block sees it",
    "patterns/probing",
    "with torch.no_grad():\n    with model.trace(PROMPT, remote=True):",
    differs="`torch.no_grad()` around a trace stays on your machine. In a session, write it around the traces.",
)
def no_grad_outside(model: Any, remote: Any) -> Values:
    with torch.no_grad():  # noqa: SIM117 (as the page writes it)
        with model.trace(PROMPT, remote=remote):
            tracked = nnsight.save(model.transformer.h[0].output.requires_grad)
    return {"tracked": tracked}


@construct(
    "no_grad around a trace of a session",
    "patterns/probing",
    "with torch.no_grad():\n    with model.trace(PROMPT):",
)
def no_grad_in_session(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        before = torch.is_grad_enabled()
        with torch.no_grad():  # noqa: SIM117 (as a session is written)
            with model.trace(PROMPT):
                tracked = nnsight.save(model.transformer.h[0].output.requires_grad)
        kept = nnsight.save(before)
    return {"tracked": tracked, "kept": kept}
