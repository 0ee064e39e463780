"""Values that come back."""

from __future__ import annotations

from typing import Any

import nnsight

from tests.contract.constructs.construct import PROMPT, Values, construct


@construct("numbers, texts, truth values", "usage/save", 'number = nnsight.save(12)\ntext = nnsight.save("done")')
def plain_values(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.lm_head.output
        number = nnsight.save(12)
        fraction = nnsight.save(0.1)
        text = nnsight.save("done")
        true = nnsight.save(bool(model.lm_head.weight.numel() > 3))
        big = nnsight.save(2**200)
        raw = nnsight.save(b"\x00\xff")
    return {"number": number, "fraction": fraction, "text": text, "true": true, "big": big, "raw": raw}


@construct("lists, tuples, dictionaries and sets, nested", "usage/save", "found = dict().save()")
def containers(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        found = dict().save()
        for layer, block in enumerate(model.transformer.h):
            found[layer] = {"norm": block.output.norm(), "pair": (layer, [block.output[0, 0, :2]])}
        names = {"a", "b"}.save()
    return {"found": found, "names": names}


@construct(
    "a list saved first and filled later",
    "usage/conditionals-and-loops",
    "found = list().save()\nfound.append(layer.output)",
)
def filled_later(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        found = list().save()
        for layer in model.transformer.h:
            found.append(layer.output)
    return {"found": found}


@construct(
    "elements saved one by one, in a saved list",
    "patterns/steering",
    "states.append(layer.output.save())",
    note="the list must be saved as well",
)
def saved_elements(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        states = list().save()
        for layer in model.transformer.h:
            states.append(layer.output.save())
    return {"states": states}


@construct(
    "the same tensor under two names", "usage/save", "also = hidden[:, -1].save()\nboth = [hidden, hidden].save()"
)
def shared_values(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output.save()
        also = hidden[:, -1].save()
        both = [hidden, hidden].save()
    return {"hidden": hidden, "also": also, "both": both}


@construct(
    "the keys and values that attention kept", "models/transformers-model", "kept = model.output.past_key_values.save()"
)
def key_value_cache(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, use_cache=True, remote=remote):
        kept = model.output.past_key_values.save()
    return {"kept": kept}


@construct(
    "what the tokenizer made",
    "models/transformers-model",
    'encoded = model.tokenizer(PROMPT, return_tensors="pt").save()',
)
def encoded_value(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.lm_head.output
        encoded = model.tokenizer(PROMPT, return_tensors="pt").save()
    return {"encoded": dict(encoded)}


@construct(
    "the weights of a module",
    "patterns/sae-and-auxiliary-modules",
    "weights = model.transformer.ln_f._module.state_dict().save()",
)
def state_dict(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.lm_head.output
        weights = model.transformer.ln_f._module.state_dict().save()
    return {"weights": dict(weights)}


@construct("a value that was never saved", "remote/remote-trace", "hidden = model.transformer.h[0].output")
def not_saved(model: Any, remote: Any) -> Values:
    hidden = None
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[0].output
        logits = model.lm_head.output.save()
    return {"hidden": hidden, "logits": logits}


@construct(
    "a function",
    "usage/save",
    "made = (lambda value: value + 1).save()",
    refused="'made' is a function, which cannot leave the site as data. Save what it returns instead.",
)
def saved_function(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.lm_head.output
        made = (lambda value: value + 1).save()
    return {"made": made(1)}


@construct(
    "a module of the model",
    "usage/save",
    "head = model.lm_head._module.save()",
    refused="'head' is a Linear, which cannot leave the site as data. Save its state_dict() instead.",
)
def saved_module(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote):
        model.lm_head.output
        head = model.lm_head._module.save()
    return {"head": type(head).__name__}
