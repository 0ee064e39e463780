"""A digest over a loaded model's weights: shows that no job has changed them for the next one."""

from __future__ import annotations

import hashlib
from typing import Any


def weights_digest(model: Any) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers of an nnsight model.

    Reads every byte of the weights: about a second a GB.
    """
    import torch

    total = hashlib.sha256()
    module = model._module
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(memoryview(flat.view(torch.uint8).numpy()))
    return total.hexdigest()
