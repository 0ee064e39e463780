"""nnsight's model keys: `import.path.Class:{json}`. Read by a table; a client's key never names code that is loaded."""

from __future__ import annotations

import json

from edif_mesh.domain.site import ModelRef
from edif_mesh.errors import RefusedError

_CLASSES = frozenset(
    {
        "nnsight.modeling.transformers.TransformersModel",
        "nnsight.modeling.language.LanguageModel",
        "nnsight.modeling.vlm.VisionLanguageModel",
    }
)
MAX_KEY_CHARACTERS = 2_000


def parse_model_key(key: str) -> ModelRef:
    """Return the model that a key names; raises RefusedError with a sentence."""
    if len(key) > MAX_KEY_CHARACTERS:
        raise RefusedError("The model key is too long.")
    path, _, rest = key.partition(":")
    if path not in _CLASSES:
        raise RefusedError(
            f"This mesh serves transformers models (nnsight's TransformersModel or LanguageModel), not {path[:100]!r}."
        )
    try:
        value = json.loads(rest)
        repo_id, revision, task = value["repo_id"], value.get("revision"), value.get("task")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError("The model key is not one that nnsight 0.8 makes. Is nnsight up to date?") from error
    texts = (repo_id, revision or "", task or "")
    if not all(isinstance(text, str) and len(text) <= 300 for text in texts) or not repo_id:
        raise RefusedError("The model key names no model.")
    if value.get("trust_remote_code"):
        raise RefusedError(
            f"Sites of this mesh load no code from model repositories, so {repo_id} cannot be asked for with trust_remote_code."
        )
    return ModelRef(repo_id, revision, task or "text-generation")


def make_model_key(repo_id: str, revision: str | None, task: str) -> str:
    """Return the key that nnsight makes for a model, to the letter."""
    return "nnsight.modeling.transformers.TransformersModel:" + json.dumps(
        {"repo_id": repo_id, "revision": revision, "task": task}
    )
