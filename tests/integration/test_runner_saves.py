"""What cannot be sent is refused at the line that saves it, before the job goes on; see also the table in test_archive_refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from edif_mesh.errors import UnsupportedValueError
from site_agent.hosting.lender import ModelHost
from site_agent.runner.saves import PARTS_OF_A_SAVE, checked_saves
from tests import traces
from tests.hosted import run, tiny_host

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[ModelHost]:
    async with tiny_host(ready=1) as host:
        yield host


def refused_in_a_step(model: Any, capture: Any) -> None:
    with model.trace("Hello world", backend=capture):
        print("before")
        hidden = model.transformer.h[0].output.save()
        found = {"inner": [hidden, lambda x: x]}.save()
        print("after", found)


def refused_by_the_function(model: Any, capture: Any) -> None:
    import nnsight

    with model.trace("Hello world", backend=capture):
        print("before")
        block = nnsight.save(model.transformer.h[0]._module)
        print("after", block)


def refused_as_a_module_of_nnsight(model: Any, capture: Any) -> None:
    with model.trace("Hello world", backend=capture):
        print("before")
        model.transformer.h[0].save()
        print("after")


def saved_in_a_loop(model: Any, capture: Any) -> None:
    import torch

    with model.trace("Hello world", backend=capture) as tracer:
        cache = tracer.cache().save()
        steps = [].save()
        for number in range(1000):
            steps.append(torch.full((3,), number))
            steps.save()
        hidden = model.transformer.h[-1].output.save()


def filled_later(model: Any, capture: Any) -> None:
    with model.trace("Hello world", backend=capture):
        found = [].save()
        hidden = model.transformer.h[0].output
        found.append((hidden, (number for number in range(3))))
        print("after")


def caught(model: Any, capture: Any) -> None:
    with model.trace("Hello world", backend=capture):
        found = None
        try:
            found = (lambda x: x).save()
        except Exception as error:
            found = str(error).save()


@pytest.mark.parametrize(
    ("body", "sentence", "line"),
    [
        (refused_in_a_step, "'found['inner'][1]' is a function", "found = {'inner': [hidden, lambda x: x]}.save()"),
        (refused_by_the_function, "'block' is a", "block = nnsight.save(model.transformer.h[0]._module)"),
        (
            refused_as_a_module_of_nnsight,
            "'value' is a Envoy, which cannot leave the site as data. Save its .output instead.",
            "model.transformer.h[0].save()",
        ),
    ],
    ids=["method", "function", "module of nnsight"],
)
async def test_a_refused_save_ends_the_job_at_its_line(host: ModelHost, body: Any, sentence: str, line: str) -> None:
    ended = await run(host, traces.payload(body))
    assert ended.failure.code == "unsupported_value"
    assert ended.log == "before\n", "the job went on after the refused save"
    said, where, code = ended.failure.text.splitlines()
    assert said.startswith(sentence)
    assert where.startswith(f'Refused at once, where it is saved: File "{__file__}", line ')
    assert code.strip() == line


async def test_what_can_be_sent_is_saved_as_before(host: ModelHost) -> None:
    values = (await run(host, traces.payload(saved_in_a_loop))).values
    assert len(values["steps"]) == 1000
    assert "model.transformer.h.0" in values["cache"].keys()  # noqa: SIM118 (a view has no iterator)
    assert values["hidden"].shape[-1] == 64


async def test_only_the_job_s_own_saves_are_looked_at_and_a_look_is_bounded() -> None:
    from nnsight.tracing import tracer

    before = tracer.mark
    tracer.inc()
    with checked_saves():
        assert tracer.mark is not before
        tracer.mark([[1, 2, 3]] * PARTS_OF_A_SAVE + [print])
        with pytest.raises(UnsupportedValueError):
            tracer.mark([print])
    tracer.dec()
    assert tracer.mark is before


async def test_what_is_put_into_a_saved_list_later_is_refused_at_the_end(host: ModelHost) -> None:
    ended = await run(host, traces.payload(filled_later))
    assert ended.log == "after\n"
    assert (ended.failure.code, ended.failure.text.count("\n")) == ("unsupported_value", 0)
    assert "'found[0][1]' is a generator" in ended.failure.text
    assert "list(...)" in ended.failure.text


async def test_the_code_may_catch_the_refusal_and_save_something_else(host: ModelHost) -> None:
    assert "'found' is a function" in (await run(host, traces.payload(caught))).values["found"]
