"""How much memory a model will take, reckoned from its checkpoint before anything is loaded: headers only, no weights.

The estimate counts every tensor in the width in which it will be held, a tied weight once, and `HOST_BYTES` for the
process. It leaves out buffers that a model makes for itself (positions, masks), and the scales of formats that the
checkpoint has not been stored in are reckoned from their block sizes. `memory_bytes` is the measured successor.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST_BYTES = 448 << 20
"""What the process of a loaded model takes beside the weights: Python, torch, transformers and nnsight; 390 to 430 MB were
measured (2 cores, no GPU)."""
_MAX_HEADER_BYTES = 100 << 20
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_HELD = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0, "fp8": 1.0 + 4 / 128**2}
"""Bytes of one weight, its share of the scales included: one float32 for 64 weights, and for a block of 128 x 128."""
_COMPUTES = {"int8": "float16"}
"""In what a format computes and holds the rest where nnsight takes another dtype than bfloat16."""
_EMBEDDINGS = ("embed", "wte.", "wpe.", "lm_head", "shared.")
"""Names of two-dimensional weights that no format of nnsight's quantizes."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    kind: str
    shape: tuple[int, ...]
    stored_bytes: int


def estimate_weights_bytes(folder: Path, dtype: str = "auto", quantization: str = "") -> int:
    """Return the bytes of the loaded weights; 0 when the folder holds no weights that are known here.

    `dtype` and `quantization` as in `ModelConfig`. Safetensors are read by their headers; `.bin` files count by their
    size, in proportion when another dtype is asked for than the configuration names; `.gguf` by their size.
    Raises OSError, ValueError or struct.error for a damaged checkpoint.
    """
    config = _config(folder)
    target = held_dtype(folder, dtype, quantization)
    files = _files(folder, "model.safetensors", "*.safetensors")
    if files:
        stored = bool(checkpoint_quantization(folder))
        tensors = [tensor for file in files for tensor in _headers(file)]
        return sum(_held_bytes(t, target, quantization, stored) for t in _untied(tensors, config))
    if files := _files(folder, "pytorch_model.bin", "*.bin"):
        size = sum(file.stat().st_size for file in files)
        was = _WIDTHS.get(str(_setting(config, "dtype") or _setting(config, "torch_dtype") or ""), 0)
        width = _HELD.get(quantization, float(_WIDTHS.get(target, was)))
        return int(size * width / was) if was else size
    return sum(file.stat().st_size for file in folder.glob("*.gguf"))


def memory_bytes(weights_bytes: int, resident_bytes: int = 0) -> int:
    """Return what a model takes of the machine: as estimated, or as measured where the host's resident size is known."""
    return resident_bytes or weights_bytes + HOST_BYTES


def resident_bytes(pid: int) -> int:
    """Return the memory that a process holds in RAM, mapped files included; 0 when that cannot be read."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def held_dtype(folder: Path, dtype: str = "auto", quantization: str = "") -> str:
    """Return the dtype that the weights will have, or compute in when quantized; "" where the checkpoint does not say."""
    if dtype != "auto":
        return dtype
    if quantization:
        return _COMPUTES.get(quantization, "bfloat16")
    config = _config(folder)
    return str(_setting(config, "dtype") or _setting(config, "torch_dtype") or "").removeprefix("torch.")


def checkpoint_quantization(folder: Path) -> str:
    """Return how the checkpoint itself holds its weights, as its configuration says; "" when that is a plain dtype."""
    said = _config(folder).get("quantization_config")
    if not isinstance(said, dict):
        return ""
    bits = said.get("bits") or (4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else 0)
    return str(said.get("quant_method") or "quantized") + (f"-{bits}bit" if bits else "")


def _files(folder: Path, single: str, pattern: str) -> list[Path]:
    """The files of one checkpoint: those that the index names; a folder may hold the same weights in other files too."""
    index = folder / f"{single}.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (folder / single).is_file():
        return [folder / single]
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith(("adapter_", "training_args")))


def _headers(file: Path) -> Iterator[_Tensor]:
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header: dict[str, Any] = json.loads(handle.read(min(length, _MAX_HEADER_BYTES)))
    for name, said in header.items():
        if name != "__metadata__":
            begin, end = said["data_offsets"]
            yield _Tensor(name, said["dtype"], tuple(said["shape"]), end - begin)


def _untied(tensors: list[_Tensor], config: dict[str, Any]) -> list[_Tensor]:
    """Leave out an output head that shares its weight with the embeddings and was stored once more."""
    shapes = {t.shape for t in tensors if any(word in t.name for word in ("embed_tokens", "wte"))}
    tied = _setting(config, "tie_word_embeddings") is True
    return [t for t in tensors if not (tied and t.name.endswith("lm_head.weight") and t.shape in shapes)]


def _held_bytes(tensor: _Tensor, target: str, quantization: str, stored: bool) -> int:
    if stored or tensor.kind not in _FLOATS:
        return tensor.stored_bytes
    count = math.prod(tensor.shape)
    linear = len(tensor.shape) == 2 and not any(word in tensor.name for word in _EMBEDDINGS)
    if quantization and linear:
        return math.ceil(count * _HELD[quantization])
    return count * _WIDTHS[target] if target in _WIDTHS else tensor.stored_bytes


def _config(folder: Path) -> dict[str, Any]:
    said = json.loads((folder / "config.json").read_text())
    return said if isinstance(said, dict) else {}


def _setting(config: dict[str, Any], name: str) -> Any:
    """Models of several modalities keep what concerns their text in a part of its own."""
    nested = config.get("text_config")
    return config.get(name, nested.get(name) if isinstance(nested, dict) else None)
