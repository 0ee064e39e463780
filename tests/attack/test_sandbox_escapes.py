"""What a runner is left with: what an honest job needs, its own socket, and nothing else. The attempts to get more are in `corpus`."""

import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from site_agent.hosting.lender import ModelHost
from tests import traces
from tests.hosted import code, run, tiny_host

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[ModelHost]:
    async with tiny_host(ready=2) as host:
        yield host


async def test_what_an_honest_job_needs_is_there(host: ModelHost) -> None:
    source = """
import os, threading, time, json, tempfile
import torch, numpy
import xml.dom.minidom, concurrent.futures, torch.nn.utils.parametrize, transformers.models.llama.modeling_llama
got = []
thread = threading.Thread(target=lambda: got.append(torch.ones(3).sum().item())); thread.start(); thread.join()
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    got += list(pool.map(lambda n: n * 2, [1, 2]))
torch.set_num_threads(2)
(torch.ones(400, 400) @ torch.ones(400, 400)).sum()
time.sleep(0.01)
outcome = (got, os.environ.get("HOME"), sorted(n for n in os.environ if "KEY" in n or "TOKEN" in n or "PASS" in n))
"""
    assert (await run(host, code(source))).values["outcome"][0] == [3.0, 2, 4]
    host.replenish()


async def test_a_runner_holds_its_socket_and_nothing_else(host: ModelHost) -> None:
    source = """
import os
held = []
for number in range(256):
    try:
        mode = os.fstat(number).st_mode & 0o170000
    except OSError:
        continue
    held.append((number, "socket" if mode == 0o140000 else "device" if mode == 0o020000 else oct(mode)))
outcome = [kind for _, kind in held]
"""
    assert (await run(host, code(source))).values["outcome"] == ["device", "device", "device", "socket"]
    host.replenish()


async def test_the_host_and_the_next_job_live_on(host: ModelHost) -> None:
    os.kill(host.facts.pid, 0)
    assert signal.getsignal(signal.SIGTERM) is not None
    assert "hidden" in (await run(host, traces.one_read())).values
