"""The data classes of transformers, tokenizers and nnsight that researchers save -> nodes."""

from __future__ import annotations

from typing import Any

import torch

from edif_mesh.errors import UnsupportedValueError
from edif_mesh.results.archive_types import CACHE_LAYERS, CACHES, KV_LAYERS, LAYER_ATTRIBUTES, Node, Walk

_CACHE_HINT = "Save its layers' tensors: [(c.keys, c.values) for c in cache.layers]."


def library_node(walk: Walk, value: Any, kind: type, path: str, depth: int) -> Node | None:
    """Encode a value of one of these libraries, or return None when it is none of the known data classes."""
    name = kind.__name__
    if name in ("BatchEncoding", "BatchFeature"):
        return _batch(walk, value, name, path, depth)
    if name == "Encoding" and kind.__module__.startswith("tokenizers"):
        return _encoding(walk, value, path)
    if name == "AddedToken" and kind.__module__.startswith("tokenizers"):
        flags = [value.single_word, value.lstrip, value.rstrip, value.normalized, value.special]
        return {"t": "added_token", "v": walk.node(value.content, path, depth), "f": flags}
    if name == "CacheView":
        return _activation_cache(walk, value, path, depth)
    if kind.__module__ == "transformers.cache_utils":
        return _cache(walk, value, name, path, depth)
    return None


def _batch(walk: Walk, value: Any, name: str, path: str, depth: int) -> Node:
    pairs = [[walk.node(k, f"{path} key", depth), walk.node(v, f"{path}[{k!r}]", depth)] for k, v in value.data.items()]
    if name == "BatchFeature":
        return {"t": "batch_feature", "v": pairs}
    node: Node = {"t": "batch_encoding", "v": pairs}
    if value.encodings is not None:
        node["e"] = [_encoding(walk, part, f"{path}.encodings[{i}]") for i, part in enumerate(value.encodings)]
        node["n"] = value.n_sequences
    return node


def _encoding(walk: Walk, value: Any, path: str) -> Node:
    """The tokenizer's own JSON of an encoding, as bytes."""
    return {"t": "encoding", "s": walk.add_encoding(value.__getstate__(), path)}


def _activation_cache(walk: Walk, value: Any, path: str, depth: int) -> Node:
    cache, at = object.__getattribute__(value, "_cache"), value._node_path()
    entries = [
        [where, [[walk.node(e.output, f"{path}[{where!r}].output", depth),
                  walk.node(e.inputs, f"{path}[{where!r}].inputs", depth)] for e in visits]]
        for where, visits in cache.entries.items() if at is None or f"{where}.".startswith(f"{at}.")
    ]  # fmt: skip
    return {"t": "activation_cache", "v": entries} | ({} if at is None else {"p": at})


def _cache(walk: Walk, value: Any, name: str, path: str, depth: int) -> Node | None:
    if name == "EncoderDecoderCache":
        both = [value.self_attention_cache, value.cross_attention_cache]
        nodes = [walk.node(part, f"{path}.{word}", depth) for part, word in zip(both, ("self", "cross"), strict=True)]
        return {"t": "encoder_decoder_cache", "v": nodes, "u": [[i, bool(u)] for i, u in value.is_updated.items()]}
    if name not in CACHES:
        return None
    layers = value.layers
    if name == "DynamicCache" and all(map(_is_kv_layer, layers)):
        nodes = [_kv_layer(walk, c, f"{path}.layers[{i}]", depth) for i, c in enumerate(layers)]
        return {"t": "kv_cache", "v": nodes} | ({} if value.layer_class_to_replicate else {"f": True})
    return {
        "t": "cache",
        "c": name,
        "v": [_layer(walk, c, f"{path}.layers[{i}]", depth) for i, c in enumerate(layers)],
    }


def _is_kv_layer(layer: Any) -> bool:
    return type(layer).__name__ in KV_LAYERS and not getattr(layer, "record_past", False)


def _kv_layer(walk: Walk, layer: Any, path: str, depth: int) -> list[Node]:
    """`[class, keys, values, settings]`; only the layers that are two tensors and two numbers."""
    name = type(layer).__name__
    settings = [walk.node(getattr(layer, a), f"{path}.{a}", depth) for a in KV_LAYERS[name]]
    keys, values = walk.node(layer.keys, f"{path}.keys", depth), walk.node(layer.values, f"{path}.values", depth)
    return [name, keys, values, settings]


def _layer(walk: Walk, layer: Any, path: str, depth: int) -> list[Node]:
    """`[class, [[attribute, node], ...]]`; a device is where the tensors will be, on the CPU."""
    name = type(layer).__name__
    unknown = sorted(set(vars(layer)) - LAYER_ATTRIBUTES)
    if name not in CACHE_LAYERS or unknown:
        raise UnsupportedValueError(path, name, _CACHE_HINT)
    cpu = torch.device("cpu")
    attributes = {a: cpu if isinstance(v, torch.device) else v for a, v in vars(layer).items()}
    return [name, [[a, walk.node(v, f"{path}.{a}", depth)] for a, v in attributes.items()]]
