"""Python in a block."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from typing import Any

import numpy as np
import torch

from tests.contract import local_module
from tests.contract.constructs.construct import OTHER, PROMPT, Values, construct

SCALE = 3.0


@construct("conditions on values", "usage/conditionals-and-loops", "if hidden.norm() > 1e-3:")
def conditional(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        if hidden.norm() > 1e-3:
            model.transformer.h[1].output[:] = 0
        else:
            model.transformer.h[1].output[:] = 1
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "loops over layers, with enumerate",
    "usage/conditionals-and-loops",
    "for number, layer in enumerate(model.transformer.h):",
)
def loop(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        found = dict().save()
        for number, layer in enumerate(model.transformer.h):
            found[number] = layer.output[0, -1]
    return {"found": found}


@construct(
    "comprehensions",
    "usage/conditionals-and-loops",
    "means = [layer.output.mean() for layer in model.transformer.h].save()",
)
def comprehension(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        means = [layer.output.mean() for layer in model.transformer.h].save()
        positive = {int(i) for i in model.lm_head.output[0, -1].argsort()[:5]}.save()
    return {"means": means, "positive": positive}


@construct("while, break and continue", "usage/conditionals-and-loops", "while True:")
def while_loop(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden, rounds = model.transformer.h[0].output, 0
        while True:
            rounds += 1
            if rounds < 3:
                continue
            if hidden.norm() / rounds > 0:
                break
        count = rounds.save()
    return {"count": count}


@construct(
    "functions defined before the block",
    "usage/conditionals-and-loops",
    "norm = normalized(model.transformer.h[0].output).save()",
)
def helper_function(model: Any, remote: Any) -> Values:
    def normalized(value: torch.Tensor) -> torch.Tensor:
        return (value - value.mean()) / value.std()

    with model.trace(PROMPT, remote=remote):
        norm = normalized(model.transformer.h[0].output).save()
    return {"norm": norm}


@construct("functions that read and change the model", "remote/register-local-modules", "damp(model, 0, 0.5)")
def function_of_model(model: Any, remote: Any) -> Values:
    def damp(envoy: Any, layer: int, by: float) -> Any:
        envoy.transformer.h[layer].output[:] *= by
        return envoy.transformer.h[layer].output.norm()

    with model.trace(PROMPT, remote=remote):
        size = damp(model, 0, 0.5).save()
        logits = model.lm_head.output.save()
    return {"size": size, "logits": logits}


@construct("functions defined in the block", "usage/conditionals-and-loops", "def twice(value):")
def function_inside(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):

        def twice(value):
            return value * 2

        doubled = twice(model.transformer.h[0].output).save()
    return {"doubled": doubled}


@construct(
    "lambdas, partials and closures", "usage/conditionals-and-loops", "halved = functools.partial(torch.mul, other=0.5)"
)
def lambdas(model: Any, remote: Any) -> Values:
    factor = 1.5
    halved = functools.partial(torch.mul, other=0.5)
    scaled = lambda value: halved(value) * factor * SCALE  # noqa: E731
    with model.trace(PROMPT, remote=remote):
        value = scaled(model.transformer.h[0].output).save()
    return {"value": value}


@construct("recursion and generators", "usage/conditionals-and-loops", "def down(value: torch.Tensor, times: int)")
def recursion(model: Any, remote: Any) -> Values:
    def down(value: torch.Tensor, times: int) -> torch.Tensor:
        return value if times == 0 else down(value / 2, times - 1)

    def pieces(value: torch.Tensor) -> Any:
        yield from value.split(2, dim=1)

    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        small = down(hidden, 5).save()
        sizes = [piece.shape[1] for piece in pieces(hidden)].save()
    return {"small": small, "sizes": sizes}


@construct("a class of your own with state", "remote/register-local-modules", "recorder.add(layer.output)")
def own_class(model: Any, remote: Any) -> Values:
    class Recorder:
        def __init__(self) -> None:
            self.norms: list[float] = []

        def add(self, value: torch.Tensor) -> None:
            self.norms.append(value.norm().item())

        @property
        def total(self) -> float:
            return sum(self.norms)

    with model.trace(PROMPT, remote=remote):
        recorder = Recorder()
        for layer in model.transformer.h:
            recorder.add(layer.output)
        norms, total = recorder.norms.save(), recorder.total.save()
    return {"norms": norms, "total": total}


@construct(
    "a torch module of your own, with its weights",
    "patterns/sae-and-auxiliary-modules",
    "codes = encoder(model.transformer.h[0].output).save()",
)
def own_torch_module(model: Any, remote: Any) -> Values:
    class Encoder(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(width, 2 * width)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.inner(hidden))

    torch.manual_seed(1)
    encoder = Encoder(model.config.n_embd)
    with model.trace(PROMPT, remote=remote):
        codes = encoder(model.transformer.h[0].output).save()
    return {"codes": codes}


@construct(
    "a module of your own that is not installed at the site",
    "remote/register-local-modules",
    "steering = local_module.Steering(2.0)",
)
def local_file(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        steering = local_module.Steering(2.0)
        steered = steering.apply(model.transformer.h[0].output).save()
    return {"steered": steered}


@construct("imports in the block", "patterns/remote-dataset-sweep", "import torch.nn.functional as F")
def imports_inside(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        import torch.nn.functional as F

        value = F.gelu(model.transformer.h[0].output).save()
    return {"value": value}


@construct(
    "numpy and the standard library", "usage/conditionals-and-loops", "rounded = np.round(hidden.detach().numpy(), 2)"
)
def other_libraries(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        rounded = np.round(hidden.detach().numpy(), 2).tolist().save()
        counts = collections.Counter(hidden.argmax(-1).flatten().tolist()).most_common(2).save()
        root = math.sqrt(2).save()
    return {"rounded": rounded, "counts": counts, "root": root}


@construct("variables from before the block", "usage/trace", "model.transformer.h[0].output[:] = shift")
def outer_variables(model: Any, remote: Any) -> Values:
    shift, names, options = torch.full((model.config.n_embd,), 0.25), ["a", "b"], {"layer": 1}
    with model.trace(PROMPT, remote=remote):
        model.transformer.h[0].output[:] = shift
        found = {name: model.transformer.h[options["layer"]].output.sum() for name in names[:1]}.save()
    return {"found": found}


@construct("assertions that hold", "usage/conditionals-and-loops", "assert hidden.shape[-1] == model.config.n_embd")
def assertion(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        assert hidden.shape[-1] == model.config.n_embd
        kept = hidden.save()
    return {"kept": kept}


@construct(
    "try, except and finally", "usage/conditionals-and-loops", "except RuntimeError as error:\n    text = str(error)"
)
def exceptions_inside(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        try:
            hidden @ torch.zeros(3, 3)
        except RuntimeError as error:
            text = str(error).split(" (")[0]
        finally:
            done = True
        said, ended = text.save(), done.save()
    return {"said": said, "ended": ended}


@construct("with blocks of torch", "usage/backward-and-grad", "with torch.no_grad():")
def torch_contexts(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        with torch.no_grad():
            hidden = model.transformer.h[0].output * 2
        tracked = hidden.requires_grad.save()
        kept = hidden.save()
    return {"tracked": tracked, "kept": kept}


@construct(
    "random numbers with a seed", "usage/access-and-modify", "torch.manual_seed(3)\nnoise = torch.randn_like(hidden)"
)
def random_numbers(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        torch.manual_seed(3)
        hidden = model.transformer.h[0].output
        noise = torch.randn_like(hidden)
        model.transformer.h[0].output = hidden + 0.1 * noise
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("print", "remote/remote-trace", 'print("norm", hidden.norm())', note="the lines arrive while the job runs")
def printing(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        print("norm", hidden.norm())
        kept = hidden.save()
    return {"kept": kept}


@construct(
    "dataclasses and named tuples inside a block",
    "usage/conditionals-and-loops",
    "found = Finding(layer=0, size=hidden.norm())",
)
def dataclass_inside(model: Any, remote: Any) -> Values:
    @dataclasses.dataclass
    class Finding:
        layer: int
        size: torch.Tensor

    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        found = Finding(layer=0, size=hidden.norm())
        size = dataclasses.replace(found, layer=1).size.save()
    return {"size": size}


@construct("a block that asks for nothing", "usage/trace", "pass")
def empty_block(model: Any, remote: Any) -> Values:
    with model.trace(OTHER, remote=remote):
        pass
    return {"nothing": None}
