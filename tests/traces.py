"""Payloads of real nnsight traces against the tiny model, serialized as nnsight's own client does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tests import models


class _Capture:
    payload: bytes = b""

    def __call__(self, tracer: Any) -> None:
        from nnsight.schema.request import RequestModel

        self.payload = RequestModel.serialize(tracer, False)


@functools.cache
def tiny_model() -> Any:
    """The tiny GPT-2 without weights, as a client has it."""
    base = models.cache() / f"models--{models.tiny_gpt2().replace('/', '--')}"
    folder = base / "snapshots" / (base / "refs" / "main").read_text()
    import torch
    from nnsight.modeling.transformers import TransformersModel

    torch.set_num_threads(1)
    # By its folder: whoever imported huggingface_hub before has fixed where hub ids are looked for.
    return TransformersModel(str(folder), task="text-generation")


def loaded_tiny_model() -> Any:
    """The tiny GPT-2 with its weights, in this process."""
    folder = next((models.cache() / f"models--{models.tiny_gpt2().replace('/', '--')}" / "snapshots").iterdir())
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(str(folder), task="text-generation", dispatch=True)


def payload(body: Callable[[Any, Any], None]) -> bytes:
    """Return the payload of the trace that `body(model, capture)` makes with `backend=capture`."""
    capture = _Capture()
    body(tiny_model(), capture)
    return capture.payload


def one_read() -> bytes:
    """Saves the last hidden state."""

    def body(model: Any, capture: Any) -> None:
        with model.trace("Hello world", backend=capture):
            hidden = model.transformer.h[-1].output.save()

    return payload(body)


def printing() -> bytes:
    """Prints three lines and saves the logits."""

    def body(model: Any, capture: Any) -> None:
        with model.trace("Hello world", backend=capture):
            print("one")
            print("two")
            print("three")
            logits = model.output.save()

    return payload(body)


def failing() -> bytes:
    """Divides by zero."""

    def body(model: Any, capture: Any) -> None:
        with model.trace("Hello world", backend=capture):
            hidden = model.transformer.h[-1].output.save()
            1 / 0

    return payload(body)


def endless() -> bytes:
    """Never ends by itself."""

    def body(model: Any, capture: Any) -> None:
        with model.trace("Hello world", backend=capture):
            hidden = model.transformer.h[-1].output.save()
            while True:
                pass

    return payload(body)


def large(mebibytes: int) -> bytes:
    """Saves a tensor of this size."""

    def body(model: Any, capture: Any) -> None:
        import torch

        with model.trace("Hello world", backend=capture):
            big = torch.ones(mebibytes << 18).save()

    return payload(body)


def slow(seconds: float) -> bytes:
    """Waits, then saves the last hidden state."""

    def body(model: Any, capture: Any) -> None:
        with model.trace("Hello world", backend=capture):
            import time

            time.sleep(seconds)
            hidden = model.transformer.h[-1].output.save()

    return payload(body)
