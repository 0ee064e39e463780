"""Experiments."""

from __future__ import annotations

from typing import Any

import torch

from tests.contract.constructs.construct import OTHER, PROMPT, Values, construct


@construct(
    "logit lens over all layers",
    "patterns/logit-lens",
    "model.lm_head(model.transformer.ln_f(layer.output))[0].argmax(-1)",
)
def lens_over_layers(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        guesses = list().save()
        for layer in model.transformer.h:
            guesses.append(model.lm_head(model.transformer.ln_f(layer.output))[0].argmax(-1))
    return {"guesses": guesses}


@construct(
    "activation patching over layers and positions",
    "patterns/activation-patching",
    "model.transformer.h[layer].output[:, position] = clean[layer][:, position]",
)
def activation_patching(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        with model.trace([5, 6, 7]):
            clean = [layer.output.clone() for layer in model.transformer.h]
        effects = torch.zeros(2, 3).save()
        for layer in range(2):
            for position in range(3):
                with model.trace([5, 9, 7]):
                    model.transformer.h[layer].output[:, position] = clean[layer][:, position]
                    effects[layer, position] = model.lm_head.output[0, -1, 7]
    return {"effects": effects}


@construct(
    "causal tracing with noise on the subject",
    "(an experiment of the field)",
    "model.transformer.wte.output[:, 1:3] += noise",
)
def causal_tracing(model: Any, remote: Any) -> Values:
    torch.manual_seed(4)
    noise = torch.randn(2, model.config.n_embd)
    with model.trace(remote=remote) as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke([5, 6, 7, 8]):
            clean = model.transformer.h[0].output[:, 2]
            meet()
        with tracer.invoke([5, 6, 7, 8]):
            model.transformer.wte.output[:, 1:3] += noise
            meet()
            model.transformer.h[0].output[:, 2] = clean
            restored = model.lm_head.output[:, -1].save()
    return {"restored": restored}


@construct(
    "a steering direction from contrasting prompts",
    "patterns/steering",
    "direction = torch.stack(positive).mean(0) - torch.stack(negative).mean(0)",
)
def steering_direction(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        positive, negative = [], []
        with model.trace() as tracer:
            for text, where in (("a small hello", positive), (OTHER, positive), ("in the city", negative)):
                with tracer.invoke(text):
                    where.append(model.transformer.h[0].output[0, -1])
        direction = torch.stack(positive).mean(0) - torch.stack(negative).mean(0)
        with model.generate(PROMPT, max_new_tokens=3) as tracer:
            for _step in tracer.iter[:3]:
                model.transformer.h[0].output[:, -1] += 4 * direction
            ids = tracer.result.save()
    return {"ids": ids}


@construct(
    "a function vector: mean head outputs added elsewhere",
    "(an experiment of the field)",
    "heads = model.transformer.h[1].attn.c_proj.input",
)
def function_vector(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        with model.trace(["hello world", "small city"]):
            heads = model.transformer.h[1].attn.c_proj.input
            parts = heads[:, -1].view(2, model.config.n_head, -1).mean(0)
        with model.trace(PROMPT):
            chosen = torch.zeros_like(parts)
            chosen[:2] = parts[:2]
            vector = chosen.flatten() @ model.transformer.h[1].attn.c_proj.weight
            model.transformer.h[1].output[:, -1] += vector
            logits = model.lm_head.output[:, -1].save()
    return {"logits": logits}


@construct(
    "path patching of one head",
    "tutorial, circuit finding",
    "given.view(*given.shape[:2], model.config.n_head, -1)[:, :, 1] = clean",
)
def path_patching(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke([5, 6, 7]):
            clean = model.transformer.h[0].attn.c_proj.input.unflatten(-1, (model.config.n_head, -1))[:, :, 1]
            meet()
        with tracer.invoke([5, 9, 7]):
            given = model.transformer.h[0].attn.c_proj.input
            meet()
            given.view(*given.shape[:2], model.config.n_head, -1)[:, :, 1] = clean
            logits = model.lm_head.output[:, -1].save()
    return {"logits": logits}


@construct(
    "a sparse autoencoder applied and spliced in",
    "patterns/sae-and-auxiliary-modules",
    "model.transformer.h[0].output[:] = decoder(codes)",
)
def sparse_autoencoder(model: Any, remote: Any) -> Values:
    torch.manual_seed(5)
    width = model.config.n_embd
    encoder, decoder = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
    with model.trace(PROMPT, remote=remote):
        codes = torch.relu(encoder(model.transformer.h[0].output))
        codes[..., 3] = 0
        model.transformer.h[0].output[:] = decoder(codes)
        active = (codes > 0).sum(-1).save()
        logits = model.lm_head.output.save()
    return {"active": active, "logits": logits}


@construct(
    "a transcoder in a module's place",
    "patterns/sae-and-auxiliary-modules",
    "model.transformer.h[1].mlp.skip(transcoder(given))",
)
def transcoder(model: Any, remote: Any) -> Values:
    torch.manual_seed(6)
    transcoder = torch.nn.Sequential(
        torch.nn.Linear(model.config.n_embd, 16), torch.nn.ReLU(), torch.nn.Linear(16, model.config.n_embd)
    )
    with model.trace(PROMPT, remote=remote):
        given = model.transformer.h[1].mlp.input
        model.transformer.h[1].mlp.skip(transcoder(given))
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "a dictionary trained on activations in a session", "tutorial, dictionary learning", "buffer = torch.cat(buffer)"
)
def dictionary_learning(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        buffer = []
        for text in (PROMPT, OTHER):
            with model.trace(text) as tracer:
                buffer.append(model.transformer.h[0].mlp.output.detach()[0])
                tracer.stop()
        buffer = torch.cat(buffer)
        torch.manual_seed(8)
        width = buffer.shape[-1]
        encoder, decoder = torch.nn.Linear(width, 128), torch.nn.Linear(128, width, bias=False)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
        losses = list().save()
        for _round in range(3):
            codes = torch.relu(encoder(buffer))
            loss = (decoder(codes) - buffer).pow(2).mean() + 1e-3 * codes.abs().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {"losses": losses}


@construct(
    "an interchange intervention in a learned basis",
    "(an experiment of the field)",
    "rotated[:, :8] = source @ basis[:, :8]",
)
def interchange(model: Any, remote: Any) -> Values:
    torch.manual_seed(9)
    basis = torch.linalg.qr(torch.randn(model.config.n_embd, model.config.n_embd)).Q
    with model.session(remote=remote):
        with model.trace([5, 6, 7]):
            source = model.transformer.h[0].output[:, -1]
        with model.trace([5, 9, 7]):
            rotated = model.transformer.h[0].output[:, -1] @ basis
            rotated[:, :8] = source @ basis[:, :8]
            model.transformer.h[0].output[:, -1] = rotated @ basis.T
            logits = model.lm_head.output[:, -1].save()
    return {"logits": logits}


@construct(
    "a future lens: hidden states carried to another prompt",
    "(an experiment of the field)",
    "model.transformer.h[1].output[:, 0] = hidden",
)
def future_lens(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        with model.trace(PROMPT):
            hidden = model.transformer.h[1].output[:, 3]
        with model.generate(OTHER, max_new_tokens=3) as tracer:
            model.transformer.h[1].output[:, 0] = hidden
            ids = tracer.result.save()
    return {"ids": ids}


@construct(
    "ablating each head in turn, in one batch",
    "patterns/per-head-attention",
    "for head in range(model.config.n_head):\n    with tracer.invoke(PROMPT):",
)
def each_head(model: Any, remote: Any) -> Values:
    with model.trace(remote=remote) as tracer:
        found = list().save()
        for head in range(model.config.n_head):
            with tracer.invoke(PROMPT):
                given = model.transformer.h[0].attn.c_proj.input
                given.view(*given.shape[:2], model.config.n_head, -1)[:, :, head] = 0
                found.append(model.lm_head.output[0, -1])
    return {"found": found}


@construct(
    "all heads of a layer patched in one pass, in one job",
    "post, How to make your NDIF experiment 130x faster",
    "kept = tracer.cache(modules=[attention.c_proj], include_inputs=True)\nmodel.transformer.h[0].skip(before)",
)
def heads_in_one_job(model: Any, remote: Any) -> Values:
    heads = model.config.n_head
    with model.session(remote=remote):
        attention = model.transformer.h[1].attn
        with model.trace([5, 6, 7]) as tracer:
            kept = tracer.cache(modules=[attention.c_proj], include_inputs=True)
        clean = kept[attention.c_proj.path].input.unflatten(-1, (heads, -1))
        with model.trace([5, 9, 7]) as tracer:
            before = model.transformer.h[0].output
            tracer.stop()
        effects = list().save()
        with model.trace() as tracer:
            for head in range(heads):
                with tracer.invoke([5, 9, 7]):
                    model.transformer.h[0].skip(before)
                    given = attention.c_proj.input
                    given.view(*given.shape[:2], heads, -1)[:, :, head] = clean[:, :, head]
                    effects.append(model.lm_head.output[0, -1, 7])
    return {"effects": effects}
