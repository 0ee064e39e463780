"""Changes that would reach the next job if both ran in one process: weights, tokenizer, torch, nnsight, Python itself."""

from __future__ import annotations

STATE = {
    "every weight": "import torch\nwith torch.no_grad():\n    for p in model._module.parameters(): p.fill_(7.0)",
    "one weight by its address": "import ctypes\np = next(model._module.parameters())\nctypes.memset(p.data_ptr(), 1, 64)",
    "a hook on a layer": "model._module.transformer.h[0].register_forward_hook(lambda m, i, o: (o[0] * 0, *o[1:]) if isinstance(o, tuple) else o * 0)",
    "a layer taken out": "model._module.transformer.h[1] = model._module.transformer.h[0]",
    "training mode": "for part in model._module.modules():\n    if hasattr(part, 'p'): part.p = 0.9\nmodel._module.train()",
    "the tokenizer's words": "model.tokenizer.add_tokens(['Hello', 'world'])",
    "the tokenizer's encoding": "type(model.tokenizer).__call__ = lambda self, *a, **k: 1 / 0",
    "torch's linear layer": "import torch\ntorch.nn.functional.layer_norm = lambda x, *a, **k: x * 0\ntorch.nn.LayerNorm.forward = lambda self, x: x * 0",
    "torch's default type": "import torch; torch.set_default_dtype(torch.float64)",
    "nnsight's tracer": "import nnsight.tracing.tracer as t\nt._saves = lambda: set()",
    "nnsight's payloads": "import nnsight.schema.request as r\nr.RequestModel.deserialize = None",
    "the standard library": "import json, os\njson.dumps = json.loads = None\nos.getpid = lambda: 1",
    "builtins": "import builtins\nbuiltins.len = lambda x: 0",
}
"""By name; each must change what `REFERENCE` says when both run in one process."""

REFERENCE = """
import hashlib, json, os, torch
import nnsight.schema.request, nnsight.tracing.tracer
digest = hashlib.sha256()
for parameter in model._module.parameters():
    digest.update(parameter.detach().contiguous().numpy().tobytes())
with torch.no_grad():
    ids = torch.tensor([[1, 2, 3, 4]])
    logits = model._module(ids).logits
outcome = json.loads(json.dumps({
    "weights": digest.hexdigest(),
    "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
    "tokens": model.tokenizer("Hello world, in the city of Paris")["input_ids"],
    "vocabulary": len(model.tokenizer),
    "dtype": str(torch.zeros(1).dtype),
    "training": model._module.training,
    "nnsight": [nnsight.tracing.tracer._saves.__name__, nnsight.schema.request.RequestModel.deserialize.__qualname__],
    "linear": torch.nn.Linear.forward.__qualname__,
}))
"""
"""Says everything that a change could touch; equal to the bit before and after."""
