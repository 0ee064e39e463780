"""Ways to run and to wait."""

from __future__ import annotations

import asyncio
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import nnsight
from nnsight import CONFIG, LanguageModel, TransformersModel
from nnsight.intervention.backends.remote import AsyncRemoteBackend, RemoteBackend
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.contract.constructs.construct import PROMPT, Values, construct, loaded_again
from tests.models import ADAPTER, lora_adapter


def polled(backend: Any) -> Any:
    """Ask until the saved values are there."""
    while (found := backend()) is None:
        pass
    return found


@construct(
    "a model without weights on your machine",
    "remote/remote-trace",
    "fresh = loaded_again(model, dispatch=not remote)",
    note="no weights are read, nor needed",
)
def without_weights(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=not remote)
    with fresh.trace(PROMPT, remote=remote):
        hidden = fresh.transformer.h[-1].output.save()
        logits = fresh.lm_head.output.save()
    if remote:
        assert fresh.device.type == "meta"
    return {"hidden": hidden, "logits": logits}


@construct(
    "the older class LanguageModel", "models/language-model", "fresh = LanguageModel(folder, dispatch=not remote)"
)
def language_model(model: Any, remote: Any) -> Values:
    folder = model._module.config._name_or_path
    fresh = LanguageModel(folder, dispatch=not remote)
    fresh.repo_id = model.repo_id
    with fresh.trace(PROMPT, remote=remote):
        logits = fresh.lm_head.output.save()
    return {"logits": logits}


@construct(
    "a model that transformers loaded",
    "models/transformers-model",
    "TransformersModel(AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer)",
)
def preloaded(model: Any, remote: Any) -> Values:
    folder = model._module.config._name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fresh = TransformersModel(AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer)
    fresh.repo_id = model.repo_id
    with fresh.trace(PROMPT, remote=remote):
        logits = fresh.lm_head.output.save()
    return {"logits": logits}


@construct("the address in place of True", "remote/api-key-and-config", "model.trace(PROMPT, remote=address)")
def address(model: Any, remote: Any) -> Values:
    address = CONFIG.API.HOST if remote else False
    with model.trace(PROMPT, remote=address):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "a rehearsal on your own machine",
    "remote/ndif-overview",
    'model.trace(PROMPT, remote="local")',
    note="needs no mesh; shows what cannot be sent",
)
def rehearsal(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote="local"):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("status lines and sizes", "remote/api-key-and-config", "model.trace(PROMPT, remote=True, verbose=True)")
def verbose(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote, verbose=True):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "submit now, ask later",
    "remote/non-blocking-jobs",
    "with model.trace(PROMPT, remote=True, blocking=False) as tracer:\nresult = polled(tracer.backend)",
)
def non_blocking(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote, blocking=False) as tracer:
        logits = model.lm_head.output.save()
    result = polled(tracer.backend) if remote else {"logits": logits}
    return {"logits": result["logits"]}


@construct(
    "a session that is submitted now and asked later",
    "remote/remote-session",
    "with model.session(remote=True, blocking=False) as session:",
)
def non_blocking_session(model: Any, remote: Any) -> Values:
    with model.session(remote=remote, blocking=False) as session:  # noqa: SIM117 (a trace inside a session)
        with model.trace(PROMPT):
            logits = model.lm_head.output.save()
    result = polled(session.backend) if remote else {"logits": logits}
    return {"logits": result["logits"]}


@construct(
    "an earlier job, by its id",
    "remote/non-blocking-jobs",
    "RemoteBackend(key, blocking=False, job_id=tracer.backend.job_id)",
    note="after any restart of yours: results are kept",
)
def by_job_id(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote, blocking=False) as tracer:
        logits = model.lm_head.output.save()
    if remote:
        key = model.to_model_key()
        logits = polled(RemoteBackend(key, blocking=False, job_id=tracer.backend.job_id))["logits"]
    return {"logits": logits}


@construct("awaited in an event loop", "remote/remote-async", "result = await backend")
def awaited(model: Any, remote: Any) -> Values:
    async def wait(backend: Any) -> Any:
        result = await backend
        return result

    backend = AsyncRemoteBackend(model.to_model_key()) if remote else None
    with model.trace(PROMPT, backend=backend):
        logits = model.lm_head.output.save()
    return {"logits": asyncio.run(wait(backend))["logits"] if remote else logits}


@construct(
    "a backend made by hand",
    "remote/remote-trace",
    "backend = RemoteBackend(model.to_model_key(), host=CONFIG.API.HOST)",
)
def own_backend(model: Any, remote: Any) -> Values:
    backend = RemoteBackend(model.to_model_key(), host=CONFIG.API.HOST) if remote else None
    with model.trace(PROMPT, backend=backend):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("what a job cost, in the mesh's words", "remote/ndif-overview", 'tracer.backend.meta["runtime_s"]')
def cost(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote) as tracer:
        logits = model.lm_head.output.save()
    known = tracer.backend.meta["runtime_s"] > 0 if remote else True
    return {"logits": logits, "known": known}


@construct("an uncompressed exchange", "reference/config", "CONFIG.API.COMPRESS = False")
def uncompressed(model: Any, remote: Any) -> Values:
    before = CONFIG.API.COMPRESS
    CONFIG.API.COMPRESS = False
    try:
        with model.trace(PROMPT, remote=remote):
            logits = model.lm_head.output.save()
    finally:
        CONFIG.API.COMPRESS = before
    return {"logits": logits}


@construct(
    "a PEFT adapter, from the start",
    "models/transformers-model",
    "peft=adapter",
    note="where the site has it in its cache",
)
def peft_adapter(model: Any, remote: Any) -> Values:
    adapter = str(lora_adapter())
    fresh = loaded_again(model, dispatch=True, peft=adapter)
    fresh.peft = ADAPTER
    with fresh.trace(PROMPT, remote=remote):
        logits = fresh.lm_head.output.save()
    return {"logits": logits}


@construct(
    "a PEFT adapter, loaded later and taken off again",
    "models/transformers-model",
    "fresh.load_adapter(adapter)\nfresh.load_adapter(None)",
)
def peft_later(model: Any, remote: Any) -> Values:
    adapter = str(lora_adapter())
    fresh = loaded_again(model, dispatch=True)
    fresh.load_adapter(adapter)
    fresh.peft = ADAPTER
    with fresh.trace(PROMPT, remote=remote):
        adapted = fresh.lm_head.output.save()
    fresh.peft = adapter
    fresh.load_adapter(None)
    with fresh.trace(PROMPT, remote=remote):
        plain = fresh.lm_head.output.save()
    return {"adapted": adapted, "plain": plain}


@construct("your own module, sent along on request", "remote/register-local-modules", "nnsight.register(my_tools)")
def registered(model: Any, remote: Any) -> Values:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "my_tools.py").write_text("LIMIT = 3\n\n\ndef first(value):\n    return value[:, :LIMIT]\n")
        sys.path.insert(0, folder)
        try:
            my_tools = importlib.import_module("my_tools")
            nnsight.register(my_tools)
            with model.trace(PROMPT, remote=remote):
                part = my_tools.first(model.transformer.h[0].output).save()
        finally:
            sys.path.remove(folder)
            sys.modules.pop("my_tools", None)
    return {"part": part}


@construct(
    "a call without a block",
    "reference/api-quick-reference",
    "whole = model.trace(PROMPT, trace=False)\nids = model.generate(PROMPT, max_new_tokens=3)",
    note="runs on your own machine",
)
def no_block(model: Any, remote: Any) -> Values:
    whole = model.trace(PROMPT, trace=False)
    ids = model.generate(PROMPT, max_new_tokens=3)
    return {"logits": whole.logits, "ids": ids}


@construct(
    "shapes without running the model",
    "usage/scan",
    "with fresh.scan(PROMPT):",
    note="on your own machine: it needs no weights",
)
def scan(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=False)
    with fresh.scan(PROMPT):
        width = fresh.transformer.h[0].output.shape[-1].save()
    return {"width": width}
