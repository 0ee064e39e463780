"""What a payload may refer to: this site's model, and nothing else that only looks like a part of it.

nnsight sends no module of a model; it sends its path, and the site puts its own module there. Everything that a researcher
wrapped or attached has such a path too, and some of them collide with the model's: a wrapped autoencoder is called "model"
like the model itself, and so is a second model. Left alone, a job would run the wrong module and return plausible numbers.
"""

from __future__ import annotations

from typing import Any


class ForeignModuleError(Exception):
    """The payload refers to a module that is not the site's; the text says what to write instead."""


def keep_to_one_model() -> None:
    """In a runner, before it opens its payload: refuse what is not a part of the one model, and run inner traces here.

    A trace inside a remote session may say `remote=True` itself: it is at the site already, and stays in this process.
    """
    from nnsight.intervention.envoy import Envoy
    from nnsight.modeling.mixins.remotable import Remotable

    original = Envoy.__setstate__
    models: set[tuple[str, str]] = set()

    def rebuild(envoy: Any, state: dict[str, Any]) -> None:
        if "." not in str(state.get("path", "")):
            if not isinstance(envoy, Remotable):
                raise ForeignModuleError(
                    "Your code uses a module that is wrapped with NNsight(...), which nnsight cannot tell from the site's "
                    "model. Call the torch module itself in the block; it is sent along with its weights."
                )
            models.add((str(state.get("repo_id")), str(state.get("revision"))))
            if len(models) > 1:
                names = " and ".join(sorted(name if at == "None" else f"{name} ({at})" for name, at in models))
                raise ForeignModuleError(
                    f"Your code uses two models, {names}; a job runs on one. Write a trace or a session for each, and hand saved "
                    "values on."
                )
        original(envoy, state)

    Envoy.__setstate__ = rebuild
    Remotable._remote_backend = lambda *_: None


def payload_sentence(error: BaseException) -> str:
    """Say why a payload could not be opened, and what to change."""
    from nnsight.intervention.serialization import UnknownPersistentIdError

    if isinstance(error, ForeignModuleError):
        return str(error)
    if isinstance(error, UnknownPersistentIdError) and (path := str(error)).startswith("Module:"):
        return (
            f"Your code uses the module {path.removeprefix('Module:')!r}, which the model at this site does not have: a module that "
            "you attach to a model does not travel. Keep the torch module in a variable of its own and call that in the block; it "
            "is sent along with its weights."
        )
    if isinstance(error, ModuleNotFoundError):
        return (
            f"Your code needs the module {error.name!r}, which this site does not have. Send it along with "
            f"nnsight.register({error.name!r}), define what you use in your own script, or ask the site to install it."
        )
    return f"The payload is not a trace that nnsight can rebuild here: {type(error).__name__}: {error}"
