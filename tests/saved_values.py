"""The table of what researchers save: every kind comes back as it was, or is refused with its way out.

The docs' table (docs/guides/researcher.md) has exactly these rows.
"""

from __future__ import annotations

import datetime as dt
import decimal
import fractions
import functools
import io
import math
import pathlib
import re
import types
import uuid
import warnings
import zoneinfo
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

Make = Callable[[], dict[str, Any]]


class Pair(NamedTuple):
    left: Any
    right: Any


class Tagged(dict):  # type: ignore[type-arg]
    """A dictionary with more to it."""

    def __init__(self) -> None:
        self.tag = 1


class Wrapped(torch.Tensor):
    pass


def _tensors() -> dict[str, Any]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "whole": base, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 7), "turned": torch.randn(3, 4).mT,
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "expanded": torch.ones(1).expand(5, 3),
        "gaps": torch.randn(6, 4)[1:, ::2].T, "bf16": base.bfloat16(), "half": base.half(), "bool": base > 3,
        "f8": base.to(torch.float8_e4m3fn), "u16": torch.ones(2, dtype=torch.uint16), "complex": torch.randn(3, dtype=torch.cfloat),
        "half complex": torch.zeros(2, dtype=torch.complex32), "conjugate": torch.randn(3, dtype=torch.cfloat).conj(),
        "negative": torch.randn(3, dtype=torch.cfloat).conj().imag, "four bits": torch.arange(4, dtype=torch.uint8).view(torch.uint4),
        "gradient": torch.ones(2, requires_grad=True), "parameter": torch.nn.Parameter(torch.randn(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False), "buffer": torch.nn.Buffer(torch.ones(2)),
    }  # fmt: skip


def _sparse() -> dict[str, Any]:
    dense = torch.tensor([[0.0, 2.0, 0, 0], [3.0, 0, 0, 1], [0, 0, 0, 0], [0, 5, 6, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "coo": dense.to_sparse(), "hybrid": dense.to_sparse(1), "none": torch.zeros(3, 3).to_sparse(),
            "not coalesced": torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2)), "csr": dense.to_sparse_csr(),
            "csc": dense.to_sparse_csc(), "bsr": dense.to_sparse_bsr((2, 2)), "bsc": dense.to_sparse_bsc((2, 2)),
            "batch": torch.stack([dense, dense]).to_sparse_csr(), "parameter": torch.nn.Parameter(dense.to_sparse()),
            "half": dense.to(torch.bfloat16).to_sparse(),
        }  # fmt: skip


def _quantized() -> dict[str, Any]:
    data, scales = torch.randn(4, 6), torch.rand(4) + 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "whole": torch.quantize_per_tensor(data, 0.1, 3, torch.qint8),
            "turned": torch.quantize_per_tensor(data, 0.05, 100, torch.quint8).T,
            "wide": torch.quantize_per_tensor(data, 1e-5, 0, torch.qint32),
            "channels": torch.quantize_per_channel(data, scales, torch.arange(4), 0, torch.qint8),
        }


def _numpy() -> dict[str, Any]:
    return {
        "big endian": np.arange(6, dtype=">i4").reshape(2, 3), "scalar array": np.array(3.5), "empty": np.zeros((0, 3), np.float16),
        "text": np.array(["ab", "ü"]), "bytes": np.array([b"x", b"yz"]), "complex": np.array([1 + 2j]), "long": np.array([1.5], np.longdouble),
        "by column": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "dates": np.array(["2024-01-01", "NaT"], "M8[ns]"),
        "spans": np.array([1, 2], "m8[25s]"), "f4": np.float32(1.5), "truth": np.bool_(True), "i8": np.int64(-3), "str": np.str_("é"),
        "no text": np.str_(""), "date": np.datetime64("2024-01-01"), "dtype": np.dtype("<f4"), "reversed": np.arange(4)[::-1],
    }  # fmt: skip


def _plain() -> dict[str, Any]:
    return {
        "none": None, "yes": True, "int": -7, "big": 3**20000, "float": -0.0, "inf": math.inf, "nan": math.nan, "complex": complex(math.nan, -0.0),
        "text": "Straße \U0001f600", "lone": "\ud800", "bytes": b"\x00\xff", "array": bytearray(b"abc"), "dots": ..., "range": range(3, 99, 7),
        "slice": slice(1, None, -2),
    }  # fmt: skip


def _times() -> dict[str, Any]:
    zone = dt.timezone(dt.timedelta(hours=5, minutes=30), "IST")
    return {
        "date": dt.date(2024, 2, 29), "now": dt.datetime(2024, 1, 2, 3, 4, 5, 6), "utc": dt.datetime(1, 1, 1, tzinfo=dt.UTC),
        "there": dt.datetime(2024, 1, 2, 3, fold=1, tzinfo=zone), "time": dt.time(1, 2, tzinfo=zone), "span": dt.timedelta(-1, 2, 3),
        "zone": zone, "decimal": decimal.Decimal("-1.50E+7"), "nan": [decimal.Decimal("Infinity")], "fraction": fractions.Fraction(-1, 3),
        "uuid": uuid.UUID(int=2**127), "path": pathlib.Path("/a/b"), "pure": pathlib.PureWindowsPath("c:\\x"),
    }  # fmt: skip


def _containers() -> dict[str, Any]:
    return {
        "nested": [1, (2, {"a": [{3}]}), []], "keys": {1: "int", "1": "str", None: 0, (1, ("a",)): 2, 1.5: 3, b"k": 4},
        "sets": {(1, "a"), (2, None)}, "frozen": frozenset({1, (2,)}), "ordered": OrderedDict([("b", 1), ("a", 2)]),
        "default": defaultdict(list, a=[1]), "counter": Counter("abca"), "deque": deque([1, torch.ones(2)], maxlen=5),
        "namespace": types.SimpleNamespace(a=1, b=[2]),
    }  # fmt: skip


def _torch() -> dict[str, Any]:
    return {
        "size": torch.Size([2, 3]), "dtype": torch.bfloat16, "device": torch.device("cuda:1"), "layout": torch.sparse_csr,
        "format": torch.channels_last, "scheme": torch.per_tensor_affine, "topk": torch.arange(9.0).topk(3),
        "max": torch.randn(3, 4).max(0), "svd": torch.linalg.svd(torch.eye(3)),
    }  # fmt: skip


def filled(cache: Any, layers: int = 2) -> Any:
    """Return `cache` after two tokens went through each layer."""
    for layer in range(layers):
        cache.update(torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 4), layer)
    return cache


def small_config() -> Any:
    from transformers import MistralConfig

    return MistralConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, num_key_value_heads=2, head_dim=4, sliding_window=4
    )


def _outputs() -> dict[str, Any]:
    from transformers import BatchFeature, DynamicCache
    from transformers.generation.utils import GenerateDecoderOnlyOutput
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return {
        "output": CausalLMOutputWithPast(
            logits=torch.ones(2), past_key_values=filled(DynamicCache()), hidden_states=(torch.zeros(1),)
        ),
        "generated": GenerateDecoderOnlyOutput(sequences=torch.ones(1)),
        "features": BatchFeature({"pixel_values": torch.ones(1)}),
    }


def _caches() -> dict[str, Any]:
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache, cache_utils

    config = small_config()
    mixed = DynamicCache()
    mixed.layers = [cache_utils.LinearAttentionLayer(), cache_utils.LinearAttentionAndFullAttentionLayer()]
    mixed.layer_class_to_replicate = None
    mixed.update_conv_state(torch.randn(1, 3, 4), 0)
    mixed.update_recurrent_state(torch.randn(1, 3, 4), 0)
    mixed.update(torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 4), 1)
    return {
        "mixed": mixed, "dynamic": filled(DynamicCache()), "sliding": filled(DynamicCache(config=config)),
        "static": filled(StaticCache(config, max_cache_len=8)), "fresh": StaticCache(config, max_cache_len=8),
        "both": EncoderDecoderCache(filled(DynamicCache()), filled(DynamicCache())),
    }  # fmt: skip


def _encodings() -> dict[str, Any]:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import BatchEncoding

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4, stride=1)
    encoding = tokenizer.encode("a b a c", "b a")
    batch = BatchEncoding({"input_ids": torch.tensor([encoding.ids])}, encoding=encoding, n_sequences=2)
    return {
        "encoding": encoding,
        "batch": batch,
        "slow": BatchEncoding({"input_ids": [1]}),
        "token": AddedToken("<x>", lstrip=True),
    }


SAVED: dict[str, Make] = {
    "tensors of every dtype and stride": _tensors,
    "sparse tensors": _sparse,
    "quantized tensors": _quantized,
    "numpy arrays and scalars": _numpy,
    "numbers, text, bytes": _plain,
    "dates, times, exact numbers, ids, paths": _times,
    "containers": _containers,
    "torch's own values": _torch,
    "transformers' outputs": _outputs,
    "transformers' caches": _caches,
    "tokenizer encodings": _encodings,
}


def _nested() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


def _picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (2, 2))


def _cycle() -> Any:
    loop: list[Any] = []
    loop.append(loop)
    return loop


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "module": (lambda: torch.nn.Linear(1, 1), "Linear", "state_dict()"),
    "optimizer": (lambda: torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1), "SGD", "state_dict()"),
    "function": (lambda: lambda x: x, "function", "what it returns"),
    "partial function": (lambda: functools.partial(print), "partial", "what it returns"),
    "class": (lambda: Pair, "type", "its name"),
    "generator, iterator": (lambda: (i for i in "ab"), "generator", "list(...)"),
    "view of a dictionary": (lambda: {}.values(), "dict_values", "list(...)"),
    "mapping proxy, ChainMap, UserDict": (lambda: ChainMap({}), "ChainMap", "dict(...)"),
    "container with attributes of its own": (Tagged, "Tagged with attributes of its own", "dict(...)"),
    "open file": (io.BytesIO, "BytesIO", ".read()"),
    "exception": (lambda: ValueError("x"), "ValueError", "str(...)"),
    "compiled pattern": (lambda: re.compile("a"), "Pattern", ".pattern"),
    "random generator": (torch.Generator, "Generator", "get_state()"),
    "distribution": (lambda: torch.distributions.Normal(0.0, 1.0), "Normal", ".loc"),
    "storage": (lambda: torch.ones(1).untyped_storage(), "UntypedStorage", "a tensor over it"),
    "tensor without data (meta, fake)": (lambda: torch.empty(2, device="meta"), "tensor without data (meta)", ".shape"),
    "nested tensor": (_nested, "nested tensor", ".unbind()"),
    "mkldnn tensor": (lambda: torch.ones(2).to_mkldnn(), "torch._mkldnn tensor", ".to_dense()"),
    "tensor subclass": (lambda: torch.ones(1).as_subclass(Wrapped), "tensor subclass Wrapped", ".as_subclass(torch.Tensor)"),
    "numpy array of objects": (lambda: np.array([object()]), "numpy ndarray of object", ".tolist()"),
    "numpy array with fields": (lambda: np.zeros(2, [("a", "i4")]), "numpy ndarray with fields", "fields one by one"),
    "masked array": (lambda: np.ma.masked_array([1, 2], [0, 1]), "numpy MaskedArray", ".filled()"),
    "time in a named zone": (
        lambda: dt.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")), "time in a ZoneInfo", ".astimezone("
    ),
    "picture": (_picture, "Image", "numpy.asarray(...)"),
    "tokenizer": (_tokenizer, "Tokenizer", "decode them at home"),
    "configuration": (small_config, "MistralConfig", "to_dict()"),
    "value that contains itself": (_cycle, "list", "save its parts"),
}  # fmt: skip
"""Kind -> how to make one, what the refusal calls it, the way out that it names."""
