"""Sweeps, training and settings at the site."""

from __future__ import annotations

import copy
from typing import Any

import nnsight
import torch
from nnsight.intervention.backends.remote import RemoteError

from tests.contract.constructs.construct import OTHER, PROMPT, Values, caught, construct, loaded_again

TEXTS = ("one two three", "a small tokenizer", PROMPT, OTHER, "red and blue", "to be or not")


class LoRA(torch.nn.Module):
    """A low-rank adapter over a module of the model, as nnsight's page on remote training writes it."""

    def __init__(self, module: Any, width: int, rank: int, down: Any = None, up: Any = None) -> None:
        super(LoRA, self).__init__()  # noqa: UP008 (a class that is sent along is made anew outside any class)
        self.module = module
        down = torch.randn(width, rank) if down is None else down
        up = torch.zeros(rank, width) if up is None else up
        self.down = torch.nn.Parameter(down.to(module.device), requires_grad=True)
        self.up = torch.nn.Parameter(up.to(module.device), requires_grad=True)

    def __call__(self) -> None:
        hidden = self.module.input
        delta = torch.matmul(torch.matmul(hidden.to(self.down.dtype), self.down), self.up)
        self.module.output = delta.to(hidden.dtype) + self.module.output

    def parameters(self) -> list[torch.nn.Parameter]:  # type: ignore[override]
        return [self.down, self.up]


class Doubler(torch.nn.Module):
    """A module whose `super()` names no class."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, value: Any) -> Any:
        return value * 2


@construct(
    "a sweep in one session, reduced at the site",
    "patterns/remote-dataset-sweep",
    "scores = nnsight.save([])\nscores.extend((hidden @ probe.to(hidden.device, hidden.dtype)).tolist())",
)
def sweep(model: Any, remote: Any) -> Values:
    torch.manual_seed(0)
    probe = torch.randn(model.config.n_embd)
    with model.session(remote=remote):
        scores = nnsight.save([])
        for start in range(0, len(TEXTS), 3):
            with model.trace(list(TEXTS[start : start + 3])):
                hidden = model.transformer.h[0].output[:, -1]
                scores.extend((hidden @ probe.to(hidden.device, hidden.dtype)).tolist())
    return {"scores": scores}


@construct(
    "a dictionary that counts over a session",
    "patterns/remote-dataset-sweep",
    'tally = nnsight.save({"n": 0, "correct": 0})\ntally["n"] += len(guess)',
)
def tally(model: Any, remote: Any) -> Values:
    with model.session(remote=remote):
        tally = nnsight.save({"n": 0, "correct": 0})
        for start in range(0, len(TEXTS), 2):
            with model.trace(list(TEXTS[start : start + 2])):
                logits = model.output.logits[:, -1]
                guess = (logits[:, 7] > logits[:, 9]).long().cpu()
            tally["n"] += len(guess)
            tally["correct"] += int(guess.sum())
    return {"tally": tally}


@construct(
    "data fetched by the block",
    "patterns/remote-dataset-sweep",
    "from datasets import load_dataset",
    refused="ModuleNotFoundError: No module named 'datasets'",
    note="a site need not have it, and a block reaches no network: read the rows on your machine and use them in the block",
)
def fetched_data(model: Any, remote: Any) -> Values:
    if not remote:
        return {"rows": 4}
    try:
        with model.session(remote=remote):
            from datasets import load_dataset

            rows = load_dataset("nyu-mll/glue", "sst2", split="train[:4]")
            found = nnsight.save(len(rows))
    except RemoteError as error:
        raise RuntimeError(caught(error)) from error
    return {"rows": found}


@construct(
    "an adapter class trained in a session",
    "patterns/remote-training",
    "adapter = LoRA(module, width, 4)\noptimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)",
)
def adapter_class(model: Any, remote: Any) -> Values:
    module, width = model.transformer.h[-1].mlp, model.config.n_embd
    with model.session(remote=remote):
        torch.manual_seed(1)
        adapter = LoRA(module, width, 4)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
        losses = nnsight.save([])
        for start in range(0, 4, 2):
            with model.trace(list(TEXTS[start : start + 2])):
                adapter()
                logits = model.lm_head.output
                loss = torch.nn.functional.cross_entropy(logits[:, -1], torch.tensor([7, 9]))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        down = adapter.down.detach().save()
        up = adapter.up.detach().save()
    return {"losses": losses, "down": down, "up": up}


@construct(
    "a trained adapter applied later",
    "patterns/remote-training",
    "adapter = LoRA(module, width, 4, down=trained_down, up=trained_up)",
)
def adapter_applied(model: Any, remote: Any) -> Values:
    module, width = model.transformer.h[-1].mlp, model.config.n_embd
    torch.manual_seed(5)
    trained_down, trained_up = torch.randn(width, 4), torch.randn(4, width)
    with model.generate(PROMPT, max_new_tokens=2, remote=remote):
        adapter = LoRA(module, width, 4, down=trained_down, up=trained_up)
        adapter()
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "an adapter saved whole",
    "patterns/remote-training",
    "trained = adapter.save()",
    refused="'trained' is a LoRA, which cannot leave the site as data. Save its state_dict() instead.",
)
def adapter_saved(model: Any, remote: Any) -> Values:
    module, width = model.transformer.h[-1].mlp, model.config.n_embd
    with model.trace(PROMPT, remote=remote):
        adapter = LoRA(module, width, 4)
        adapter()
        trained = adapter.save()
    return {"trained": type(trained).__name__}


@construct(
    "a class with a bare super() in its __init__",
    "remote/remote-trace",
    "doubler = Doubler()",
    refused="RuntimeError: super(): __class__ cell not found",
    note="nnsight sends classes as source; write `super(Doubler, self).__init__()`",
)
def bare_super(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote=remote):
            doubler = Doubler()
            doubled = doubler(model.transformer.h[0].output).save()
    except RemoteError as error:
        raise RuntimeError(caught(error)) from error
    return {"doubled": doubled}


@construct(
    "a list of yours, saved in the block",
    "remote/remote-trace",
    "nnsight.save(mine)",
    note="your name is bound to the site's copy",
)
def outer_saved(model: Any, remote: Any) -> Values:
    mine: list[Any] = ["first"]
    with model.trace(PROMPT, remote=remote):
        nnsight.save(mine)
        mine.append(model.lm_head.output[0, -1].argmax())
    return {"mine": mine}


@construct(
    "a weight changed for all later traces",
    "usage/access-and-modify",
    "model.lm_head.weight.data[7] = 0",
    differs="A change of a weight lasts for its own job only: the next job sees the site's weights. Keep both traces in one "
    "session, or write an edit.",
)
def lasting_weight(model: Any, remote: Any) -> Values:
    kept = model.lm_head.weight.data[7].clone()
    try:
        with model.trace(PROMPT, remote=remote):
            model.transformer.h[0].output
            model.lm_head.weight.data[7] = 0
        with model.trace(PROMPT, remote=remote):
            logits = model.lm_head.output.save()
    finally:
        model.lm_head.weight.data[7] = kept
    return {"logits": logits}


@construct(
    "a seed set just before the call",
    "usage/generate",
    "torch.manual_seed(7)\nwith model.generate(PROMPT, max_new_tokens=8, do_sample=True, remote=True) as tracer:",
    differs="Your machine's random numbers are not the site's. Set the seed in the block, before the first value is read.",
)
def seed_before(model: Any, remote: Any) -> Values:
    torch.manual_seed(7)
    with model.generate(PROMPT, max_new_tokens=8, do_sample=True, remote=remote) as tracer:
        ids = tracer.result.save()
    return {"ids": ids}


@construct(
    "another number type asked for at the client",
    "models/quantization",
    'dtype="bfloat16"',
    differs="The site decides how it holds a model's weights; `dtype=` (`nf4` and `int8` as well) shapes only your own copy.",
)
def other_dtype(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=not remote, dtype="bfloat16")
    with fresh.trace(PROMPT, remote=remote):
        logits = fresh.lm_head.output.save()
    return {"logits": logits}


@construct(
    "a configuration of your own",
    "models/transformers-model",
    "config=config",
    differs="The site builds the model from its checkpoint alone: `config=` shapes only your own copy.",
)
def own_config(model: Any, remote: Any) -> Values:
    config = copy.deepcopy(model.config)
    config.activation_function = "relu"
    fresh = loaded_again(model, dispatch=not remote, config=config)
    with fresh.trace(PROMPT, remote=remote):
        logits = fresh.lm_head.output.save()
    return {"logits": logits}
