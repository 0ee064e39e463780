"""Refuses a value at the line that saves it, not after an hour of running. Lives in the confined runner only.

nnsight marks what a trace returns with one function of its own, `nnsight.tracing.tracer.mark`: `value.save()` and
`nnsight.save(value)` both end there. While a job runs, a value is first looked at by the archive's own rules. What is
put into a saved list later is seen when the result is made, as everything is.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from edif_mesh.errors import UnsupportedValueError
from edif_mesh.results.archive_encode import Check

PARTS_OF_A_SAVE = 10_000
PARTS_OF_A_JOB = 1_000_000
"""How many parts are looked at, so that a long list that is saved again and again costs no time."""


@contextlib.contextmanager
def checked_saves(saved: Callable[[Any, str], None] | None = None) -> Iterator[None]:
    """Have `save()` raise UnsupportedValueError, in the code that calls it, for what an archive cannot hold.

    `saved(value, name)` is then told of every saved value, and of the variable that it is stored in.
    """
    from nnsight.tracing import tracer

    mark, left = tracer.mark, PARTS_OF_A_JOB

    def checked(value: Any) -> Any:
        nonlocal left
        try:
            left -= Check(min(PARTS_OF_A_SAVE, left)).look(value, "")
        except UnsupportedValueError as error:
            raise _at_the_save(error) from None
        except Exception:  # it cannot even be looked at: the result says so
            pass
        if saved is not None:
            saved(value, _name_here() or "value")
        return mark(value)

    tracer.mark = checked
    try:
        yield
    finally:
        tracer.mark = mark


def refusal(error: UnsupportedValueError) -> str:
    """The sentence, and the researcher's line when the refusal came from a `save()`."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def _at_the_save(error: UnsupportedValueError) -> UnsupportedValueError:
    """The same refusal with the name that the value was to get, and the line of the save."""
    frame = _caller()
    name = _stored_as(frame.f_code, frame.f_lasti) if frame is not None else ""
    named = UnsupportedValueError(f"{name or 'value'}{error.path}", error.type_name, error.hint)
    if frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        source = linecache.getline(file, line).strip()
        named.add_note(
            f'Refused at once, where it is saved: File "{file}", line {line}' + (f"\n    {source}" if source else "")
        )
    return named


def _caller() -> FrameType | None:
    """The innermost frame that is neither ours nor nnsight's."""
    import nnsight

    inner = os.path.dirname(str(nnsight.__file__)), os.path.dirname(__file__)
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(inner):
        frame = frame.f_back
    return frame


def _name_here() -> str:
    """The variable that gets what the researcher's running call returns, else nothing."""
    frame = _caller()
    return _stored_as(frame.f_code, frame.f_lasti) if frame is not None else ""


@functools.lru_cache(maxsize=256)
def _stored_as(code: CodeType, last: int) -> str:
    """The variable that gets what the call at instruction `last` returns, else nothing."""
    after = next((i for i in dis.get_instructions(code) if i.offset > last), None)
    return str(after.argval) if after is not None and after.opname.startswith("STORE_") and after.argval else ""
