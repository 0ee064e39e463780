"""What cannot be remote."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from nnsight import NNsight, TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend

from tests.contract.constructs.construct import PROMPT, Values, construct, loaded_again


@construct(
    "a torch module of yours, wrapped with NNsight",
    "models/nnsight-base",
    "model = NNsight(net)",
    refused="Sequential.forward() got an unexpected keyword argument 'remote'",
    note="it has no name that a site could know it by; inside a block of a model that sites serve, call the torch module itself",
)
def plain_module(model: Any, remote: Any) -> Values:
    net = torch.nn.Sequential(torch.nn.Linear(5, 10), torch.nn.Linear(10, 2))
    model = NNsight(net)
    options = {"remote": True} if remote else {}
    with model.trace(torch.ones(1, 5), **options):
        out = model[0].output.save()
    return {"shape": out.shape}


@construct(
    "vLLM models",
    "models/vllm",
    "nnsight.modeling.vllm.vllm.VLLM",
    refused="Failed to send request: This mesh serves transformers models (nnsight's TransformersModel or LanguageModel), not 'nnsight.modeling.vllm.vllm.VLLM'.",
)
def vllm(model: Any, remote: Any) -> Values:
    key = "nnsight.modeling.vllm.vllm.VLLM:" + json.dumps({"repo_id": model.repo_id, "revision": None})
    with model.trace(PROMPT, backend=RemoteBackend(key) if remote else None):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "diffusion models",
    "models/diffusion-model",
    "nnsight.modeling.diffusion.DiffusionModel",
    refused="Failed to send request: This mesh serves transformers models (nnsight's TransformersModel or LanguageModel), not 'nnsight.modeling.diffusion.DiffusionModel'.",
)
def diffusion(model: Any, remote: Any) -> Values:
    key = "nnsight.modeling.diffusion.DiffusionModel:" + json.dumps({"repo_id": model.repo_id, "revision": None})
    with model.trace(PROMPT, backend=RemoteBackend(key) if remote else None):
        logits = model.lm_head.output.save()
    return {"logits": logits}


@construct(
    "models that bring code of their own",
    "models/transformers-model",
    "trust_remote_code=True",
    refused="Failed to send request: Sites of this mesh load no code from model repositories, so MODEL cannot be asked for with "
    "trust_remote_code.",
)
def remote_code(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=True, trust_remote_code=True)
    with fresh.trace(PROMPT, remote=remote):
        logits = fresh.lm_head.output.save()
    return {"logits": logits}


@construct(
    "another task of the same model",
    "models/transformers-model",
    'fresh = TransformersModel(folder, task="feature-extraction", dispatch=not remote)',
    refused="No site can run this job as it is ordered. ansbach offers MODEL only as revision ID, float32, text-generation.",
)
def other_task(model: Any, remote: Any) -> Values:
    folder = model._module.config._name_or_path
    fresh = TransformersModel(folder, task="feature-extraction", dispatch=not remote)
    fresh.repo_id = model.repo_id
    with fresh.trace(PROMPT, remote=remote):
        hidden = fresh.h[0].output.save()
    return {"hidden": hidden}


@construct(
    "another revision of the model",
    "models/transformers-model",
    'fresh.revision = "my-branch"',
    refused="No site can run this job as it is ordered. ansbach offers MODEL only as revision ID, float32, text-generation.",
)
def other_revision(model: Any, remote: Any) -> Values:
    fresh = loaded_again(model, dispatch=not remote)
    fresh.revision = "my-branch"
    with fresh.trace(PROMPT, remote=remote):
        logits = fresh.lm_head.output.save()
    return {"logits": logits}


@construct(
    "a model that no site offers",
    "remote/status-and-availability",
    'fresh.repo_id = "nobody/nothing"',
    refused="No site of this mesh offers the model nobody/nothing. Offered are: MODEL.",
)
def unknown_model(model: Any, remote: Any) -> Values:
    from nnsight.modeling import huggingface

    fresh = loaded_again(model, dispatch=True)
    fresh.repo_id = "nobody/nothing"
    huggingface._ID_CACHE["nobody/nothing"] = "nobody/nothing"
    with fresh.trace(PROMPT, remote=remote):
        logits = fresh.lm_head.output.save()
    return {"logits": logits}


@construct(
    "two models in one session",
    "usage/session",
    "with model.session(remote=True):\n    with other.trace(PROMPT):",
    refused="Your code uses two models, edif-test/another and MODEL; a job runs on one. Write a trace or a session for "
    "each, and hand saved values on.",
)
def two_models(model: Any, remote: Any) -> Values:
    other = loaded_again(model, dispatch=True)
    other.repo_id = "edif-test/another"
    with model.session(remote=remote):
        with model.trace(PROMPT):
            hidden = model.transformer.h[0].output
        with other.trace(PROMPT):
            other.transformer.h[0].output = hidden
            logits = other.lm_head.output.save()
    return {"logits": logits}


@construct(
    "a module that is not installed at the site",
    "remote/register-local-modules",
    "my_private_tools.double(model.lm_head.output)",
    refused="Your code needs the module 'my_private_tools', which this site does not have. Send it along with "
    "nnsight.register('my_private_tools'), define what you use in your own script, or ask the site to install it.",
)
def missing_module(model: Any, remote: Any) -> Values:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "my_private_tools.py").write_text("def double(value):\n    return value * 2\n")
        sys.path.insert(0, folder)
        try:
            my_private_tools = importlib.import_module("my_private_tools")
            with model.trace(PROMPT, remote=remote):
                doubled = my_private_tools.double(model.lm_head.output).save()
        finally:
            sys.path.remove(folder)
            sys.modules.pop("my_private_tools", None)
    return {"doubled": doubled}


@construct(
    "a lock, a socket, an open file used in the block",
    "remote/ndif-overview",
    "with lock:",
    refused="cannot pickle '_thread.lock' object",
)
def unsendable(model: Any, remote: Any) -> Values:
    lock = threading.Lock()
    with model.trace(PROMPT, remote=remote):  # noqa: SIM117 (the lock is the block's)
        with lock:
            logits = model.lm_head.output.save()
    return {"logits": logits}
