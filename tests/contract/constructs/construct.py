"""What a row of docs/compatibility.md is made of: one construct of nnsight as a researcher writes it, and what the mesh says.

A construct is a function `(model, remote) -> values by name`. The tests call it twice, with `remote` false and true, and want
the same values to the last bit; where it says `refused`, they want that sentence, to the letter.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nnsight import TransformersModel

PROMPT = "The Eiffel Tower is in the city of"
OTHER = "hello world"
Values = dict[str, Any]


@dataclass(frozen=True)
class Construct:
    """One row: `run` is the code, `shows` lines of it for the page, `documented` where nnsight's documentation has it."""

    run: Callable[[Any, Any], Values]
    title: str
    documented: str
    shows: str
    refused: str | None = None
    differs: str | None = None
    says: str | None = None
    note: str = ""

    @property
    def id(self) -> str:
        """The stable name of the row and of its test."""
        return self.run.__name__

    def example_is_in_the_code(self) -> bool:
        """Whether every line of `shows` stands in the function's source, spaces aside; `remote` is shown as true."""
        body = inspect.getsource(self.run).partition(f"def {self.id}(")[
            2
        ]  # below the decorator, which holds `shows` itself
        source = "".join(body.split()).replace("remote=remote", "remote=True")
        return all("".join(line.split()) in source for line in self.shows.splitlines())


def construct(
    title: str,
    documented: str,
    shows: str,
    *,
    refused: str | None = None,
    differs: str | None = None,
    says: str | None = None,
    note: str = "",
) -> Callable[[Callable[[Any, Any], Values]], Construct]:
    """Make a function a row of the page.

    `refused` is the whole sentence that a researcher sees instead of values; `differs` says why nnsight's own way to go
    remote gives other values than a local trace, and what to write instead; `says` is the error of a mistake, which is the same
    in both (the function returns it as "said"); `note` stands beside the result.
    """
    return lambda run: Construct(run, title, documented, shows, refused, differs, says, note)


def constructs_of(module: ModuleType) -> tuple[Construct, ...]:
    """The rows of a theme, in the order of its file."""
    return tuple(value for value in vars(module).values() if isinstance(value, Construct))


def loaded_again(model: Any, **options: Any) -> Any:
    """The same checkpoint wrapped anew with other options, under the id that the mesh knows it by."""
    fresh = TransformersModel(model._module.config._name_or_path, task="text-generation", **options)
    fresh.repo_id = model.repo_id
    return fresh


def told(error: BaseException, model: Any) -> str:
    """What a refusal says, without what differs from one run to the next: ids of tensors, names of models, the line of a save."""
    text = str(error).partition("\nRefused at once, where it is saved")[0].replace(model.repo_id, "MODEL")
    text = re.sub(r"Offered are: .*", "Offered are: MODEL.", text)
    return re.sub(r"\d{9,}|(?<=revision )[0-9a-f]{12}", "ID", text)


def caught(error: BaseException) -> str:
    """The last line of an error: what it says, without the traceback that a remote one carries in its text."""
    assert "site_agent" not in str(error), "a line of the mesh stands in a researcher's traceback"
    last = str(error).strip().splitlines()[-1]
    if "Traceback (most recent call last)" not in str(error):
        # A remote error without a line of the researcher's own names its kind in its text.
        return last if type(error).__name__ == "RemoteError" else f"{type(error).__name__}: {last}"
    name, _, text = last.partition(": ")
    return f"{name.rpartition('.')[2]}: {text}" if text else last
