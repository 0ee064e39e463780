"""Gradients and training."""

from __future__ import annotations

from typing import Any

import torch

from tests.contract.constructs.construct import OTHER, PROMPT, Values, caught, construct


@construct(
    "the gradient of an activation",
    "usage/backward-and-grad",
    "with logits.sum().backward():\n    gradient = hidden.grad.save()",
)
def gradient(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[-1].output
        hidden.requires_grad_(True)
        logits = model.lm_head.output
        with logits.sum().backward():
            gradient = hidden.grad.save()
    return {"gradient": gradient}


@construct(
    "gradients of several layers, the last first",
    "patterns/gradient-based-attribution",
    "for hidden in reversed(states):\n    found.append(hidden.grad)",
)
def several_gradients(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        states, found = [layer.output for layer in model.transformer.h], list().save()
        metric = model.lm_head.output[:, -1, 7]
        with metric.sum().backward():
            for hidden in reversed(states):
                found.append(hidden.grad)
    return {"found": found}


@construct("a changed gradient", "usage/backward-and-grad", "hidden.grad[:] = 0\nembedded.grad.save()")
def changed_gradient(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        embedded = model.transformer.wte.output
        hidden = model.transformer.h[0].output
        with model.lm_head.output.sum().backward():
            before = hidden.grad.clone().save()
            hidden.grad[:] = 0
            after = embedded.grad.save()
    return {"before": before, "after": after}


@construct("a gradient put in another's place", "usage/backward-and-grad", "hidden.grad = hidden.grad * 2")
def replaced_gradient(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        embedded = model.transformer.wte.output
        hidden = model.transformer.h[0].output
        with model.lm_head.output.sum().backward():
            hidden.grad = hidden.grad * 2
            after = embedded.grad.save()
    return {"after": after}


@construct(
    "two backward passes over one graph", "usage/backward-and-grad", "with logits.sum().backward(retain_graph=True):"
)
def two_passes(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[-1].output
        logits = model.lm_head.output
        with logits.sum().backward(retain_graph=True):
            one = hidden.grad.save()
        with (logits * 2).pow(2).sum().backward():
            two = hidden.grad.save()
    return {"one": one, "two": two}


@construct(
    "gradients in one block of a batch", "usage/backward-and-grad", "with model.lm_head.output[:, -1].sum().backward():"
)
def gradient_in_batch(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        with tracer.invoke(OTHER):
            plain = model.lm_head.output[:, -1].save()
        with tracer.invoke(PROMPT):
            hidden = model.transformer.h[0].output
            with model.lm_head.output[:, -1].sum().backward():
                gradient = hidden.grad.save()
    return {"plain": plain, "gradient": gradient}


@construct(
    "gradients of the input embeddings",
    "patterns/gradient-based-attribution",
    "saliency = (embedded * embedded.grad).sum(-1).abs().save()",
)
def saliency(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        embedded = model.transformer.wte.output
        with model.lm_head.output[:, -1, 7].sum().backward():
            saliency = (embedded * embedded.grad).sum(-1).abs().save()
    return {"saliency": saliency}


@construct(
    "gradients of the weights",
    "usage/backward-and-grad",
    "model.output.logits.sum().backward()\ngradient = weight.grad.save()",
    note="for this job only",
)
def weight_gradient(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        weight = model.transformer.h[0].mlp.c_fc.weight
        model.zero_grad()
        model.output.logits.sum().backward()
        gradient = weight.grad.save()
    return {"gradient": gradient}


@construct("torch.autograd.grad", "usage/backward-and-grad", "(gradient,) = torch.autograd.grad(logits.sum(), hidden)")
def autograd_grad(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        logits = model.lm_head.output
        (gradient,) = torch.autograd.grad(logits.sum(), hidden)
        kept = gradient.save()
    return {"kept": kept}


@construct(
    "integrated gradients in a session",
    "patterns/gradient-based-attribution",
    "model.transformer.wte.output = scaled\nwith model.lm_head.output[:, -1, 7].sum().backward():",
)
def integrated_gradients(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        total = 0
        for step in range(3):
            with model.trace(PROMPT):
                scaled = model.transformer.wte.output.detach() * ((step + 0.5) / 3)
                scaled.requires_grad_(True)
                model.transformer.wte.output = scaled
                with model.lm_head.output[:, -1, 7].sum().backward():
                    part = scaled.grad
                    total = total + part
        attribution = (total / 3).save()
    return {"attribution": attribution}


@construct(
    "attribution patching in a session",
    "patterns/attribution-patching",
    "grad = states[i].grad[:, -length:]\nscores[i] = ((clean[i][:, -length:] - states[i][:, -length:]) * grad).sum().item()",
)
def attribution_patching(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        with model.trace("The Eiffel Tower is in the city"):
            clean = [layer.output.detach() for layer in model.transformer.h]
        with model.trace("The small Tower is in the city"):
            states = [layer.output for layer in model.transformer.h]
            metric = model.lm_head.output[:, -1, 7] - model.lm_head.output[:, -1, 9]
            length = min(clean[0].shape[1], states[0].shape[1])
            with metric.sum().backward():
                scores = {}
                for i in reversed(range(len(states))):
                    grad = states[i].grad[:, -length:]
                    scores[i] = ((clean[i][:, -length:] - states[i][:, -length:]) * grad).sum().item()
        found = scores.save()
    return {"found": found}


@construct(
    "a probe trained in a session",
    "patterns/probing",
    "optimizer = torch.optim.Adam(probe.parameters(), lr=0.01)",
)
def probe_training(model: Any, remote: Any) -> Values:
    torch.manual_seed(0)
    probe = torch.nn.Linear(model.config.n_embd, 2)
    with model.session(remote=remote):
        optimizer = torch.optim.Adam(probe.parameters(), lr=0.01)
        losses = list().save()
        for label, text in enumerate([PROMPT, OTHER] * 2):
            with model.trace(text):
                hidden = model.transformer.h[0].output[:, -1].detach()
                loss = torch.nn.functional.cross_entropy(probe(hidden), torch.tensor([label % 2]))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        weights = probe.state_dict().save()
    return {"losses": losses, "weights": weights}


@construct(
    "a low-rank adapter trained through the model",
    "patterns/remote-training",
    "model.transformer.h[0].mlp.output = out + given @ down @ up",
)
def adapter_training(model: Any, remote: Any) -> Values:
    torch.manual_seed(0)
    width = model.config.n_embd
    with model.session(remote=remote):
        torch.manual_seed(1)
        down = torch.randn(width, 2).requires_grad_(True)
        up = torch.zeros(2, width).requires_grad_(True)
        optimizer = torch.optim.SGD([down, up], lr=0.1)
        losses = list().save()
        for _round in range(3):
            with model.trace(PROMPT):
                given = model.transformer.h[0].mlp.input
                out = model.transformer.h[0].mlp.output
                model.transformer.h[0].mlp.output = out + given @ down @ up
                loss = -model.lm_head.output[0, -1].log_softmax(-1)[7]
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        learned = up.detach().clone().save()
    return {"losses": losses, "learned": learned}


@construct(
    "gradients while generating",
    "usage/backward-and-grad",
    "with model.lm_head.output.sum().backward():",
    note="transformers generates without gradients",
    says="NotImplementedError: This tensor does not require grad, so a backward session cannot produce gradients: nothing the block reads can ever receive one. The forward ran without gradient tracking (e.g. under torch.no_grad()), or the tensor was created without requires_grad=True.",
)
def gradient_in_generate(model: Any, remote: Any) -> Values:
    try:
        with model.generate(PROMPT, max_new_tokens=2, remote=remote):
            hidden = model.transformer.h[0].output
            with model.lm_head.output.sum().backward():
                gradient = hidden.grad.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}


@construct(
    "a backward pass after the trace",
    "usage/backward-and-grad, standalone backward",
    "loss = logits.sum()\nwith loss.backward():\n    gradient = hidden.grad.save()",
    refused="'ID.grad.i0' was requested but the model already ran past it",
    note="values come back without the graph that made them: write the backward pass in the trace",
)
def backward_afterwards(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[-1].output.save()
        logits = model.lm_head.output.save()
    loss = logits.sum()
    with loss.backward():
        gradient = hidden.grad.save()
    return {"gradient": gradient}
