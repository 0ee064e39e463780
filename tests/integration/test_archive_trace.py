"""What a real nnsight trace saves survives the archive: cache views, model outputs, topk results."""

from __future__ import annotations

import nnsight
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from edif_mesh.results.archive import plan, read
from tests.same_values import assert_same


def test_the_values_of_a_trace_come_back() -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, bos_token_id=0, eos_token_id=0)
    model = nnsight.NNsight(GPT2LMHeadModel(config).eval())
    with model.trace(torch.arange(5)[None]) as tracer:
        cache = tracer.cache(include_inputs=True).save()
        hidden = model.transformer.h[0].output.save()
        block = cache["model.transformer.h.0"].save()
        top = model.lm_head.output[0, -1].topk(3).save()
        output = model.output.save()
    back = read(plan({"cache": cache, "block": block, "hidden": hidden, "top": top, "output": output}).to_bytes())
    assert type(back["cache"]) is type(cache)
    assert back["cache"].keys() == cache.keys()
    for path in ("model.transformer.h.1", "model.lm_head"):
        assert_same(back["cache"][path].output, cache[path].output)
        assert_same(back["cache"][path].input, cache[path].input)
    assert type(back["block"]) is type(cache)
    assert_same(back["block"].output, cache["model.transformer.h.0"].output)
    assert back["block"].keys() == block.keys() == [key for key in back["cache"].keys() if "h.0" in key]  # noqa: SIM118 (a view has no iterator)
    assert_same(back["hidden"], hidden)
    assert_same(back["top"], top)
    assert type(back["output"]) is type(output)
    assert torch.equal(back["output"].logits, output.logits)
