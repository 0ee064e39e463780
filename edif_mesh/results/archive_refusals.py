"""The way out that a refusal names: what to save instead of a value that an archive cannot hold."""

from __future__ import annotations

from typing import Any

GENERIC = "Save its tensors, or plain values (.tolist(), vars(...))."
_CALL = "Save what it returns instead."
_STEPS = "Save list(...) of it instead."
_DICT = "Save dict(...) of it instead."
_FILE = "Save what it holds: .read() or .getvalue() of it."
_STATE = "Save its state_dict() instead."
_CONFIG = "Save its to_dict() instead."
_CACHE = "Save its layers' tensors: [(c.keys, c.values) for c in cache.layers]."
_NUMBERS = "Save the numbers, and draw them at home."

WAYS_OUT: dict[str, str] = {
    "torch.nn.modules.module.Module": _STATE,
    "torch.optim.optimizer.Optimizer": _STATE,
    "torch._C.Generator": "Save its get_state() instead.",
    "torch.finfo": "Save the number that you need of it, such as .eps or .max.",
    "torch.iinfo": "Save the number that you need of it, such as .max.",
    "torch.storage.UntypedStorage": "Save a tensor over it instead.",
    "torch.storage.TypedStorage": "Save a tensor over it instead.",
    "torch.distributions.distribution.Distribution": "Save its parameters, such as .probs, .logits, .loc or .scale.",
    "torch.nested._internal.nested_tensor.NestedTensor": "Save list(....unbind()) of it.",
    "torch.masked.maskedtensor.core.MaskedTensor": "Save its get_data() and get_mask().",
    "torch.distributed.tensor.DTensor": "Save its full_tensor() instead.",
    "torch._subclasses.fake_tensor.FakeTensor": "It holds no numbers; save its .shape instead.",
    "transformers.cache_utils.Cache": _CACHE,
    "transformers.configuration_utils.PreTrainedConfig": _CONFIG,
    "transformers.generation.configuration_utils.GenerationConfig": _CONFIG,
    "transformers.tokenization_utils_base.PreTrainedTokenizerBase": "Save the ids, and decode them at home with the same tokenizer.",
    "tokenizers.Tokenizer": "Save the ids, and decode them at home with the same tokenizer.",
    "nnsight.intervention.envoy.Envoy": "Save its .output instead.",
    "numpy.ma.MaskedArray": "Save its .filled(), or its .data and .mask.",
    "numpy.ndarray": "Save numpy.asarray(...) of it.",
    "numpy.random._generator.Generator": "Save its bit_generator.state instead.",
    "pandas.core.frame.DataFrame": "Save its to_dict('list') instead.",
    "pandas.DataFrame": "Save its to_dict('list') instead.",
    "pandas.core.series.Series": "Save its to_numpy() or .tolist() instead.",
    "pandas.Series": "Save its to_numpy() or .tolist() instead.",
    "polars.dataframe.frame.DataFrame": "Save its to_dict(as_series=False) instead.",
    "PIL.Image.Image": "Save numpy.asarray(...) of it.",
    "matplotlib.artist.Artist": _NUMBERS,
    "builtins.function": _CALL,
    "builtins.builtin_function_or_method": _CALL,
    "builtins.method": _CALL,
    "builtins.coroutine": _CALL,
    "functools.partial": _CALL,
    "builtins.type": "Save its name, or an instance.",
    "builtins.module": "Save the values in it that you need.",
    "builtins.dict_keys": _STEPS,
    "builtins.dict_values": _STEPS,
    "builtins.dict_items": _STEPS,
    "builtins.mappingproxy": _DICT,
    "collections.ChainMap": _DICT,
    "collections.UserDict": _DICT,
    "collections.UserList": _STEPS,
    "builtins.memoryview": "Save bytes(...) of it.",
    "array.array": "Save its tolist() instead.",
    "re.Pattern": "Save its .pattern instead.",
    "re.Match": "Save its group() or groupdict() instead.",
    "zoneinfo.ZoneInfo": "Save its .key instead.",
    "_io._IOBase": _FILE,
    "builtins.BaseException": "Save str(...) of it, or traceback.format_exc().",
}
"""By a class's full name or that of one of its bases."""


def way_out(value: Any, kind: type) -> str:
    """Return the sentence for `value`: that of the nearest base that has one, else that of what can be iterated, else `GENERIC`."""
    for base in kind.__mro__:
        found = WAYS_OUT.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            return found
    return _STEPS if hasattr(kind, "__next__") else GENERIC
