"""What cannot be sent is refused at the line that saves it, before the job goes on; see also the table in test_archive_refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from site_agent.hosting.lender import ModelHost
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
    ],
    ids=["method", "function"],
)
async def test_a_refused_save_ends_the_job_at_its_line(host: ModelHost, body: Any, sentence: str, line: str) -> None:
    ended = await run(host, traces.payload(body))
    assert ended.failure.code == "unsupported_value"
    assert ended.log == "before\n", "the job went on after the refused save"
    said, where, code = ended.failure.text.splitlines()
    assert said.startswith(sentence)
    assert where.startswith(f'Refused at once, where it is saved: File "{__file__}", line ')
    assert code.strip() == line


async def test_what_is_put_into_a_saved_list_later_is_refused_at_the_end(host: ModelHost) -> None:
    ended = await run(host, traces.payload(filled_later))
    assert ended.log == "after\n"
    assert (ended.failure.code, ended.failure.text.count("\n")) == ("unsupported_value", 0)
    assert "'found[0][1]' is a generator" in ended.failure.text
    assert "list(...)" in ended.failure.text


async def test_the_code_may_catch_the_refusal_and_save_something_else(host: ModelHost) -> None:
    assert "'found' is a function" in (await run(host, traces.payload(caught))).values["found"]
