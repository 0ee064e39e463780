"""Jobs: their status, their cost, their failures."""

from __future__ import annotations

import asyncio
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import nnsight
from nnsight import CONFIG
from nnsight.intervention.backends.remote import AsyncRemoteBackend, RemoteBackend, RemoteError

from tests.contract.constructs.construct import OTHER, PROMPT, Values, caught, construct


@construct(
    "each status as it arrives, then the values",
    "remote/remote-async",
    "async for update in backend:\n    if isinstance(update, dict):",
)
def status_stream(model: Any, remote: Any) -> Values:
    async def follow(backend: Any) -> tuple[list[str], Any]:
        seen, result = [], None
        async for update in backend:
            if isinstance(update, dict):
                result = update
            else:
                seen.append(update.status.name)
        return seen, result

    backend = AsyncRemoteBackend(model.to_model_key()) if remote else None
    with model.trace(PROMPT, backend=backend):
        logits = model.lm_head.output.save()
    seen, result = asyncio.run(follow(backend)) if remote else (["COMPLETED"], {"logits": logits})
    return {"logits": result["logits"], "last": seen[-1]}


@construct("several jobs awaited together", "remote/remote-async", "await asyncio.gather(*(run(p) for p in prompts))")
def gathered(model: Any, remote: Any) -> Values:
    async def run(prompt: str) -> Any:
        backend = AsyncRemoteBackend(model.to_model_key()) if remote else None
        with model.trace(prompt, backend=backend):
            out = model.lm_head.output[0, -1].save()
        return (await backend)["out"] if backend is not None else out

    async def both(prompts: tuple[str, ...]) -> list[Any]:
        return await asyncio.gather(*(run(p) for p in prompts))

    return {"found": asyncio.run(both((PROMPT, OTHER)))}


@construct(
    "what a job cost, in nnsight's words",
    "remote/ndif-overview",
    'tracer.backend.meta["runtime"]',
    note="seconds; memory stands in `memory_bytes` and `device_memory_bytes`, not by GPU",
)
def runtime(model: Any, remote: Any) -> Values:
    with model.trace(PROMPT, remote=remote) as tracer:
        logits = model.lm_head.output.save()
    return {"logits": logits, "known": tracer.backend.meta["runtime"] > 0 if remote else True}


@construct(
    "what a failed job cost",
    "remote/ndif-overview",
    'except RemoteError:\n    known = tracer.backend.meta["runtime"] > 0',
)
def cost_of_a_failure(model: Any, remote: Any) -> Values:
    known = not remote
    try:
        with model.trace(PROMPT, remote=remote) as tracer:
            model.transformer.h[0].output[:, 10_000] = 0
            logits = model.lm_head.output.save()
    except RemoteError:
        known = tracer.backend.meta["runtime"] > 0
    except IndexError:
        pass
    return {"known": known}


@construct(
    "a backend with a key of its own",
    "remote/remote-trace",
    'RemoteBackend(model.to_model_key(), host=CONFIG.API.HOST, api_key="mine")',
    note="a key is accepted and not needed",
)
def keyed_backend(model: Any, remote: Any) -> Values:
    backend = RemoteBackend(model.to_model_key(), host=CONFIG.API.HOST, api_key="mine") if remote else None
    with model.trace(PROMPT, backend=backend):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("a session rehearsed on your own machine", "remote/ndif-overview", 'with model.session(remote="local"):')
def rehearsed_session(model: Any, remote: Any) -> Values:
    with model.session(remote="local"):
        with model.trace(PROMPT):
            hidden = model.transformer.h[0].output
        with model.trace(OTHER):
            model.transformer.h[0].output[:, -1] = hidden[:, -1]
            logits = model.lm_head.output.save()
    return {"logits": logits}


@construct("your own module, registered by its name", "remote/register-local-modules", 'nnsight.register("my_steps")')
def registered_by_name(model: Any, remote: Any) -> Values:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "my_steps.py").write_text(
            "def steer(hidden):\n    return hidden / hidden.norm(dim=-1, keepdim=True)\n"
        )
        sys.path.insert(0, folder)
        try:
            my_steps = importlib.import_module("my_steps")
            nnsight.register("my_steps")
            with model.trace(PROMPT, remote=remote):
                vec = my_steps.steer(model.transformer.h[0].output).save()
        finally:
            sys.path.remove(folder)
            sys.modules.pop("my_steps", None)
    return {"vec": vec}


@construct("debugging output", "errors/debug-mode", "CONFIG.APP.DEBUG = True", note="sizes and each status are printed")
def debugging(model: Any, remote: Any) -> Values:
    before = CONFIG.APP.DEBUG
    CONFIG.APP.DEBUG = True
    try:
        with model.trace(PROMPT, remote=remote):
            logits = model.lm_head.output.save()
    finally:
        CONFIG.APP.DEBUG = before
    return {"logits": logits}


@construct(
    "a failure told by its status",
    "remote/remote-async",
    "async for update in backend:\n    last = update",
    note="this way nnsight raises nothing: the last update is the error",
)
def failed_stream(model: Any, remote: Any) -> Values:
    async def follow(backend: Any) -> Any:
        async for update in backend:
            last = update
        return last

    if not remote:
        return {"status": "ERROR", "told": True}
    backend = AsyncRemoteBackend(model.to_model_key())
    with model.trace(PROMPT, backend=backend):
        model.transformer.h[0].output[:, 10_000] = 0
        logits = model.lm_head.output.save()
    last = asyncio.run(follow(backend))
    return {"status": last.status.name, "told": "index 10000 is out of bounds" in last.description}


@construct(
    "an address that is none",
    "remote/api-key-and-config",
    'model.trace(PROMPT, remote="mesh.example")',
    note="said by nnsight before anything is sent",
    says="ValueError: Invalid host URL: 'mesh.example'; must start with http:// or https://",
)
def no_address(model: Any, remote: Any) -> Values:
    try:
        with model.trace(PROMPT, remote="mesh.example"):
            logits = model.lm_head.output.save()
    except Exception as error:
        said = caught(error)
    return {"said": said}
