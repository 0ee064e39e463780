"""Nodes -> the data classes of transformers, tokenizers and nnsight, by the tables in `archive_types.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from edif_mesh.errors import ArchiveError
from edif_mesh.results.archive_types import (
    CACHE_LAYERS,
    CACHES,
    KV_LAYERS,
    LAYER_ATTRIBUTES,
    MAX_ENCODING_BYTES,
    MODEL_MODULE,
    MODEL_OUTPUTS,
    Node,
    Record,
    as_int,
    as_list,
)
from edif_mesh.results.nnsight_types import activation_cache

_U32 = (1 << 32) - 1


class Libraries:
    """The rules of these kinds; `node` and `pairs` decode parts, `classes` are those that the caller named."""

    def __init__(
        self,
        node: Callable[[Node, int], Any],
        pairs: Callable[[Node, int], dict[Any, Any]],
        take: Callable[[Any], bytes],
        classes: dict[str, type],
    ) -> None:
        self._node, self._pairs, self._take, self._classes = node, pairs, take, classes
        self._encoding_bytes = 0
        self.rules: dict[str, Callable[[Node, int], Any]] = {
            "batch_encoding": self._batch,
            "batch_feature": self._batch,
            "encoding": lambda n, d: self._encoding(n),
            "added_token": self._added_token,
            "model_output": self._model_output,
            "kv_cache": self._kv_cache,
            "cache": self._cache,
            "encoder_decoder_cache": self._encoder_decoder_cache,
            "activation_cache": self._activation_cache,
        }

    # ------------------------------------------------------------------------------------------------------ tokenizers

    def _batch(self, node: Node, depth: int) -> Any:
        from transformers import BatchEncoding, BatchFeature

        data = self._pairs(node, depth)
        if node["t"] == "batch_feature":
            return BatchFeature(data)
        if "e" not in node:
            return BatchEncoding(data)
        encodings = [self._encoding(part) for part in as_list(node["e"])]
        number = None if node["n"] is None else as_int(node["n"], 0, 1 << 31)
        return BatchEncoding(data, encoding=encodings, n_sequences=number)

    def _encoding(self, node: Node) -> Any:
        """What the tokenizer said of a text: its own JSON, in which every list must have one entry for each token."""
        from tokenizers import Encoding

        raw = self._take(node["s"])
        self._encoding_bytes += len(raw)
        if self._encoding_bytes > MAX_ENCODING_BYTES:
            raise ArchiveError("The encodings of texts are too large.")
        parts = json.loads(raw)
        _check_encoding(parts)
        for part in as_list(parts["overflowing"]):
            _check_encoding(part)
            if part["overflowing"]:
                raise ArchiveError("The encoding of a text overflows twice.")
        made = Encoding()
        made.__setstate__(json.dumps(parts).encode())
        return made

    def _added_token(self, node: Node, depth: int) -> Any:
        from tokenizers import AddedToken

        text, flags = self._node(node["v"], depth), as_list(node["f"])
        if not isinstance(text, str) or len(flags) != 5 or not all(isinstance(flag, bool) for flag in flags):
            raise ArchiveError("An added token is no text with five truths.")
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return AddedToken(text, **dict(zip(names, flags, strict=True)))

    # ---------------------------------------------------------------------------------------------------- transformers

    def _model_output(self, node: Node, depth: int) -> Any:
        from transformers.utils import ModelOutput

        pairs, (module, _, name) = self._pairs(node, depth), str(node["c"]).rpartition(".")
        cls: Any = self._classes.get(str(node["c"]))
        if module in MODEL_OUTPUTS:
            cls = getattr(import_module(MODEL_OUTPUTS[MODEL_OUTPUTS.index(module)]), name, None)
        elif cls is None and MODEL_MODULE.fullmatch(module):
            cls = getattr(sys.modules.get(module), name, None)  # never imported because an archive says so
        if isinstance(cls, type) and issubclass(cls, ModelOutput):
            return cls(**pairs)
        return Record(str(node["c"]), {str(key): value for key, value in pairs.items()})

    def _kv_cache(self, node: Node, depth: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.layers = [self._kv_layer(as_list(layer), depth) for layer in as_list(node["v"])]
        if node.get("f") is True:
            cache.layer_class_to_replicate = None
        return cache

    def _kv_layer(self, layer: list[Node], depth: int) -> Any:
        from transformers import cache_utils

        name, *parts = layer
        settings = dict(zip(KV_LAYERS[name], (self._node(v, depth) for v in as_list(parts[2])), strict=True))
        if not all(type(number) is int for number in settings.values()):
            raise ArchiveError("A cache layer's settings are no numbers.")
        keys, values = self._node(parts[0], depth), self._node(parts[1], depth)
        made = getattr(cache_utils, name)(**{k: v for k, v in settings.items() if k == "sliding_window"})
        made.__dict__.update(settings)
        if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
            made.lazy_initialization(keys, values)
            made.keys, made.values = keys, values
        return made

    def _cache(self, node: Node, depth: int) -> Any:
        from transformers import cache_utils

        cls = getattr(cache_utils, CACHES[CACHES.index(node["c"])])
        cache = cls.__new__(cls)
        cache_utils.Cache.__init__(cache, layers=[self._layer(as_list(part), depth) for part in as_list(node["v"])])
        return cache

    def _layer(self, part: list[Node], depth: int) -> Any:
        """A layer with these attributes, and without its constructor, which would allocate what a number says."""
        from transformers import cache_utils

        cls = getattr(cache_utils, CACHE_LAYERS[CACHE_LAYERS.index(part[0])])
        layer = cls.__new__(cls)
        for pair in as_list(part[1]):
            name, value = as_list(pair)
            made = self._node(value, depth)
            if name not in LAYER_ATTRIBUTES or name in vars(layer) or not _is_setting(made):
                raise ArchiveError("A cache layer has an attribute that none has.")
            setattr(layer, name, made)
        return layer

    def _encoder_decoder_cache(self, node: Node, depth: int) -> Any:
        from transformers import cache_utils

        both = [self._node(part, depth) for part in as_list(node["v"])]
        if len(both) != 2 or not all(isinstance(part, cache_utils.Cache) for part in both):
            raise ArchiveError("A cache of encoder and decoder is not made of two caches.")
        cache = cache_utils.EncoderDecoderCache.__new__(cache_utils.EncoderDecoderCache)
        cache.self_attention_cache, cache.cross_attention_cache = both
        cache.is_updated = {as_int(as_list(pair)[0], 0, 1 << 20): pair[1] is True for pair in as_list(node["u"])}
        return cache

    # --------------------------------------------------------------------------------------------------------- nnsight

    def _activation_cache(self, node: Node, depth: int) -> Any:
        entries = {}
        for pair in as_list(node["v"]):
            where, visits = as_list(pair)
            entries[str(where)] = [
                (self._node(as_list(visit)[0], depth), self._node(as_list(visit)[1], depth))
                for visit in as_list(visits)
            ]
        return activation_cache(entries, None if node.get("p") is None else str(node["p"]))


def _is_setting(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is int and not isinstance(part, dict) and _is_setting(part) for key, part in value.items())
    return value is None or isinstance(value, bool | int | torch.Tensor | torch.dtype | torch.device)


def _check_encoding(parts: Any) -> None:
    """Raise ArchiveError unless this is one entry a token, and the spans of the sequences lie within them."""
    names = {"ids", "type_ids", "tokens", "words", "offsets", "special_tokens_mask", "attention_mask"}
    if not isinstance(parts, dict) or set(parts) != names | {"overflowing", "sequence_ranges"}:
        raise ArchiveError("The encoding of a text has other parts than one has.")
    count = len(as_list(parts["ids"]))
    if any(len(as_list(parts[name])) != count for name in names):
        raise ArchiveError("The encoding of a text has lists of several lengths.")
    for name in ("ids", "type_ids", "special_tokens_mask", "attention_mask"):
        for number in parts[name]:
            as_int(number, 0, _U32)
    ranges = parts["sequence_ranges"]
    if not isinstance(ranges, dict) or len(ranges) > 1000:
        raise ArchiveError("The encoding of a text has no sane sequences.")
    for span in ranges.values():
        if not as_int(span["start"], 0, count) <= as_int(span["end"], 0, count):
            raise ArchiveError("The encoding of a text has a sequence that ends before it begins.")
