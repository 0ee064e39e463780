"""Payloads for tests of what happens around a job: made by nnsight from a real traced block, in this process."""

from __future__ import annotations

import os
from typing import Any

from edif_mesh.client.backend import capture, model_ref
from edif_mesh.client.mesh import JobSpec
from edif_mesh.domain.site import Versions
from tests import traces
from tests.models import cache, tiny_gpt2


def payload_that_beats(repo_id: str, beats: int) -> tuple[bytes, JobSpec]:
    """A job that prints once a beat, a tenth of a second each, and saves the logits."""
    model = load(repo_id)
    captured: list[tuple[bytes, JobSpec]] = []
    with model.trace("hello world", backend=lambda tracer: captured.append(capture(tracer, model))):
        import time

        logits = model.lm_head.output.save()
        for beat in range(beats):
            print("beat", beat)
            time.sleep(0.1)
    return captured[0]


def payload_of_noise(repo_id: str, mebibytes: int) -> tuple[bytes, JobSpec]:
    """A job that saves so many MiB of random bytes, which no compression makes less."""
    model = load(repo_id)
    captured: list[tuple[bytes, JobSpec]] = []
    with model.trace("hello world", backend=lambda tracer: captured.append(capture(tracer, model))):
        import torch

        noise = torch.randint(0, 256, (mebibytes << 20,), dtype=torch.uint8).save()
    return captured[0]


def load(repo_id: str) -> Any:
    """A test model by its folder, since this process may have looked at another cache before; by its id for the mesh."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from nnsight import TransformersModel
    from nnsight.modeling import huggingface

    folder = next((cache() / f"models--{repo_id.replace('/', '--')}" / "snapshots").iterdir())
    model = TransformersModel(str(folder), task="text-generation", dispatch=True)
    model.repo_id = repo_id
    huggingface._ID_CACHE[repo_id] = repo_id
    return model


def large_job(mebibytes: int) -> tuple[bytes, JobSpec]:
    """Payload and order of a job whose result is this large, and travels as it is."""
    payload = traces.large(mebibytes)
    model = model_ref(load(tiny_gpt2()))
    client = Versions(nnsight="0.8.1")
    return payload, JobSpec(model, uncompressed_bytes=len(payload), client=client, compression="off")
