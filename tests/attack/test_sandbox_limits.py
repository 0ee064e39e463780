"""Jobs that take too much, print too much, outstay or break things: contained, named, and the next job is untouched."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
import torch
import zstandard

from site_agent.hosting.lender import ModelHost
from tests import traces
from tests.hosted import LIMITS, Run, code, run, tiny_host

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[ModelHost]:
    async with tiny_host(ready=1) as host:
        yield host


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reference(host: ModelHost) -> torch.Tensor:
    return (await run(host, traces.one_read())).values["hidden"]


async def ends(host: ModelHost, source: str, **limits: int) -> Run:
    """Run `source`; whatever it did, the runner's process is gone soon after."""
    runner = await host.lend()
    from tests.hosted import played

    ended = await played(runner, code(source), replace(LIMITS, **limits))
    await asyncio.wait_for(asyncio.shield(runner.exited), 10)
    with pytest.raises(ProcessLookupError):
        os.kill(runner.pid, 0)
    return ended


FAILURES = {
    "an endless loop": ("while True: pass", {"wall_ms": 700}, "wall_time"),
    "an endless loop in native code": ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", {"wall_ms": 700}, "wall_time"),
    "a loop that catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        {"wall_ms": 700},
        "wall_time",
    ),
    "sleep": ("import time; time.sleep(1000)", {"wall_ms": 700}, "wall_time"),
    "threads that burn": (
        "import threading, torch\nfor _ in range(4): threading.Thread(target=lambda: [torch.ones(600, 600) @ torch.ones(600, 600)"
        " for _ in range(10**9)]).start()\nwhile True: pass",
        {"wall_ms": 1_500},
        None,
    ),
    "a large tensor": ("import torch; x = torch.ones(50 << 30)", {}, "out_of_memory"),
    "a large list": ("x = []\nwhile True: x.append(bytearray(1 << 20))", {}, "out_of_memory"),
    "many small objects": ("x = []\nwhile True: x.append([0] * 100)", {}, "out_of_memory"),
    "a thread bomb": (
        "import threading, time\nthreading.stack_size(32768)\nfor _ in range(100_000): "
        "threading.Thread(target=time.sleep, args=(100,)).start()",
        {"memory_bytes": 8 << 30},
        None,
    ),
    "a large result": ("import torch; outcome = torch.zeros(32 << 20)", {}, "result_too_large"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", {}, "user_error"),
    "SystemExit": ("raise SystemExit(0)", {}, "user_error"),
    "a library object": ("outcome = (n for n in [1])", {}, "unsupported_value"),
    "leaving": ("import os; os._exit(0)", {}, "runner_crashed"),
    "abort": ("import os; os.abort()", {}, "runner_crashed"),
    "a segmentation fault": ("import ctypes; ctypes.string_at(0)", {}, "runner_crashed"),
    "endless recursion": ("def f(): f()\nf()", {}, "user_error"),
    "an exception that cannot be shown": (
        "class E(Exception):\n    def __str__(self): raise ValueError\n    __repr__ = __str__\nraise E()",
        {},
        "user_error",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_job_that_misbehaves_ends_and_leaves_nothing(
    host: ModelHost, reference: torch.Tensor, name: str
) -> None:
    source, limits, expected = FAILURES[name]
    ended = await ends(host, source, **limits)
    if expected is not None:
        assert ended.failure.code == expected, ended.failure
        assert ended.failure.text
    else:
        assert ended.failure.code in ("wall_time", "cpu_time", "too_many_threads", "user_error", "out_of_memory")
    after = (await run(host, traces.one_read())).values["hidden"]
    assert torch.equal(after, reference)


async def test_weights_that_a_job_changes_are_its_own(host: ModelHost, reference: torch.Tensor) -> None:
    source = """
import torch
with torch.no_grad():
    for parameter in model._module.parameters():
        parameter.fill_(7.0)
outcome = next(iter(model._module.parameters())).mean().item()
"""
    assert (await ends(host, source)).values["outcome"] == 7.0
    assert torch.equal((await run(host, traces.one_read())).values["hidden"], reference)


async def test_what_a_job_patches_in_python_is_its_own(host: ModelHost, reference: torch.Tensor) -> None:
    await ends(host, "import torch, json\ntorch.nn.Linear.forward = None\njson.dumps = None\noutcome = 1")
    assert torch.equal((await run(host, traces.one_read())).values["hidden"], reference)


async def test_a_print_flood_is_cut_with_a_sentence_and_the_job_goes_on(host: ModelHost) -> None:
    ended = await ends(host, "for n in range(300_000): print('line', n)\noutcome = 'done'", log_bytes=20_000)
    assert ended.values["outcome"] == "done"
    assert ended.log.startswith("line 0\nline 1\n")
    assert ended.log.endswith(
        "\n[the output limit of this job, 20,000 bytes, is reached; the rest is not shown. Print less, or order a higher log_bytes.]\n"
    )
    assert len(ended.log) < 20_200


async def test_a_flood_of_flushed_single_characters_is_no_flood_of_frames(host: ModelHost) -> None:
    ended = await ends(host, "for n in range(100_000): print('x', end='', flush=True)\noutcome = 'done'")
    assert ended.values["outcome"] == "done"
    assert ended.order.count("RunnerLog") < 700


async def test_a_thread_that_prints_on_cannot_break_the_result(host: ModelHost) -> None:
    source = """
import threading, torch
def chatter():
    while True: print("still here")
threading.Thread(target=chatter, daemon=True).start()
outcome = torch.arange(4 << 20, dtype=torch.int32)
"""
    ended = await ends(host, source)
    assert torch.equal(ended.values["outcome"], torch.arange(4 << 20, dtype=torch.int32))


async def test_a_job_cannot_stay_alive_after_its_end(host: ModelHost) -> None:
    source = """
import threading, time
threading.Thread(target=lambda: time.sleep(1000)).start()
outcome = 1
"""
    assert (await ends(host, source)).values["outcome"] == 1


async def test_a_zstd_bomb_is_stopped_by_counting(host: ModelHost) -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
    assert len(bomb) < 100_000
    ended = await run(host, bomb, compressed=True, max_payload_bytes=1 << 20)
    assert ended.failure.code == "payload_too_large"
    assert ended.failure.receipt.peak_memory_bytes < 64 << 20


@pytest.mark.parametrize("payload", [b"", b"\x80\x04.", b"not a pickle", os.urandom(4096), b"\x80\x05N."])
async def test_garbage_is_named_as_such(host: ModelHost, payload: bytes) -> None:
    assert (await run(host, payload)).failure.code == "bad_payload"


async def test_use_is_measured_and_not_what_the_runner_says(host: ModelHost) -> None:
    source = """
import time, torch
began = time.process_time()
while time.process_time() - began < 0.3: pass
x = torch.ones(50 << 18); del x
outcome = 1
"""
    ended = await ends(host, source)
    assert ended.values["outcome"] == 1
    assert ended.end is not None
    receipt = ended.end.receipt
    assert receipt.cpu_ms >= 300
    assert 45 << 20 < receipt.peak_memory_bytes < 300 << 20


async def test_a_kill_ends_a_running_job_with_its_reason(host: ModelHost) -> None:
    from tests.hosted import played

    runner = await host.lend()
    asyncio.get_running_loop().call_later(0.2, runner.kill, "cancelled", "Stopped by its owner.")
    ended = await played(runner, traces.endless())
    assert (ended.failure.code, ended.failure.text) == ("cancelled", "Stopped by its owner.")
