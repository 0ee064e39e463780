"""A runner's bytes are hostile: whatever they are, the supervisor ends with one terminal event and bounded memory."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edif_mesh.errors import RunnerError
from site_agent.runner.events import RunnerFailed, RunnerSucceeded
from site_agent.runner.protocol import (
    CUTS_FREE,
    HEAD,
    MAX_DATA_BYTES,
    MAX_FRAME_BYTES,
    RUNNER_CODES,
    Conversation,
    Kind,
    check_head,
    pack,
    pack_json,
    parse_failure,
)
from site_agent.runner.supervisor import Runner
from tests.hosted import LIMITS, Run, played

SMALL = replace(LIMITS, result_bytes=1000, log_bytes=1000, wall_ms=5_000)

frames = st.one_of(
    st.binary(max_size=40),
    st.builds(pack, st.sampled_from(Kind), st.binary(max_size=40)),
    st.builds(lambda kind, length: HEAD.pack(kind, length), st.integers(0, 255), st.integers(0, 2**32 - 1)),
    st.builds(lambda n: pack(Kind.DATA, bytes(n)), st.integers(0, 1000)),
    st.builds(lambda n: pack(Kind.CUT, bytes([n])), st.integers(0, 255)),
    st.builds(
        lambda code, text: pack_json(Kind.FAILED, {"code": code, "text": text}),
        st.sampled_from(sorted(RUNNER_CODES)) | st.text(max_size=9),
        st.text(max_size=30) | st.integers() | st.none(),
    ),
)


async def heard(data: bytes) -> Run:
    """Play a runner that says exactly `data` and hangs up."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])  # noqa: ASYNC220
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    try:
        runner = Runner(ours, process.pid, "cpu")
        runner.exited.set_result(0)
        loop = asyncio.get_running_loop()

        async def speak() -> None:
            with contextlib.suppress(OSError):
                await loop.sock_sendall(theirs, data)
                theirs.shutdown(socket.SHUT_WR)

        speaking = asyncio.create_task(speak())
        ended = await asyncio.wait_for(played(runner, b"payload", SMALL), 20)
        speaking.cancel()
        return ended
    finally:
        process.kill()
        process.wait()
        ours.close()
        theirs.close()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.lists(frames, max_size=6))
def test_any_bytes_lead_to_one_terminal_event(started: bool, pieces: list[bytes]) -> None:
    data = (pack(Kind.STARTED) if started else b"") + b"".join(pieces)
    ended = asyncio.run(heard(data))
    assert isinstance(ended.end, RunnerSucceeded | RunnerFailed)
    assert ended.order.count("RunnerStarted") <= 1
    assert len(ended.data) <= 1000
    assert len(ended.log) <= 10_000
    if isinstance(ended.end, RunnerSucceeded):
        assert len(ended.data) == ended.end.receipt.result_bytes > 0
    else:
        assert ended.end.code in RUNNER_CODES | {"protocol", "runner_crashed"}
        ended.end.text.encode()


LIES = {
    "a frame of 4 GB": HEAD.pack(Kind.LOG, 2**32 - 1),
    "an unknown kind": HEAD.pack(77, 0),
    "a job": pack(Kind.JOB, b"{}"),
    "ready again": pack(Kind.STARTED) + pack(Kind.READY),
    "started twice": pack(Kind.STARTED) + pack(Kind.STARTED),
    "done without a result": pack(Kind.STARTED) + pack(Kind.DONE),
    "a result before the start": pack(Kind.DATA, bytes(10)),
    "a result beyond the limit": pack(Kind.STARTED) + pack(Kind.DATA, bytes(600)) + pack(Kind.DATA, bytes(401)),
    "a frame of data beyond every limit": pack(Kind.STARTED) + HEAD.pack(Kind.DATA, MAX_DATA_BYTES + 1),
    "an empty frame of data": pack(Kind.STARTED) + pack(Kind.DATA) + pack(Kind.DONE),
    "a cut of two bytes": pack(Kind.STARTED) + pack(Kind.CUT, b"ab"),
    "only cuts": pack(Kind.STARTED) + pack(Kind.CUT, b"a") * 3 + pack(Kind.DONE),
    "endless empty words": pack(Kind.STARTED) + pack(Kind.LOG) * 100_000,
    "a failure of the site": pack_json(Kind.FAILED, {"code": "sandbox", "text": "blame the site"}),
    "a failure in a code of the supervisor": pack_json(Kind.FAILED, {"code": "host_lost", "text": ""}),
    "a failure that is a list": pack(Kind.FAILED, b"[]"),
    "deep JSON": pack(Kind.FAILED, b"[" * 100_000),
    "a huge number": pack(Kind.FAILED, b'{"code":' + b"9" * 10_000 + b"}"),
}


@pytest.mark.parametrize("name", LIES)
async def test_a_lie_is_a_protocol_failure(name: str) -> None:
    assert (await heard(LIES[name])).failure.code == "protocol"


async def test_a_runner_that_hangs_up_has_crashed() -> None:
    cut = pack(Kind.STARTED) + HEAD.pack(Kind.DATA, 100) + bytes(50)
    ended = await heard(cut)
    assert ended.failure.code == "runner_crashed"
    assert ended.failure.receipt.result_bytes == 0


async def test_text_reaches_every_database() -> None:
    text = (await heard(pack(Kind.FAILED, b'{"code": "user_error", "text": "a\\u0000b\\ud800"}'))).failure.text
    assert text == "a\ufffdb?"


async def test_a_character_cut_between_two_frames_is_whole() -> None:
    euro = "€".encode()
    said = pack(Kind.STARTED) + pack(Kind.LOG, euro[:1]) + pack(Kind.LOG, euro[1:])
    assert (await heard(said)).log == "€"


@given(st.binary(min_size=HEAD.size, max_size=HEAD.size))
def test_a_frame_head_is_bounded_before_anything_is_allocated(raw: bytes) -> None:
    try:
        kind, length = check_head(raw)
    except RunnerError:
        return
    assert length <= MAX_DATA_BYTES
    assert kind is Kind.DATA or length <= MAX_FRAME_BYTES


@given(st.binary(max_size=200))
def test_a_failure_frame_is_text_or_refused(data: bytes) -> None:
    try:
        code, text = parse_failure(data, RUNNER_CODES)
    except RunnerError:
        return
    assert code in RUNNER_CODES
    text.encode()


@given(st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 500)), max_size=60))
def test_no_conversation_has_two_starts_two_ends_or_more_than_the_limits(said: list[tuple[Kind, int]]) -> None:
    talk, accepted = Conversation(log_bytes=1000, result_bytes=1000), []
    for kind, length in said:
        try:
            talk.accept(kind, length)
        except RunnerError:
            break
        accepted.append((kind, length))
    kinds = [kind for kind, _ in accepted]
    assert kinds.count(Kind.STARTED) <= 1
    assert sum(length for kind, length in accepted if kind is Kind.DATA) <= 1000
    assert Kind.DONE not in kinds or (kinds.index(Kind.DONE) == len(kinds) - 1 and Kind.DATA in kinds)
    assert sum(length for kind, length in accepted if kind is Kind.LOG) <= 1000 + 4096 + 64


async def test_cuts_beyond_what_a_broker_should_bear_are_not_honoured() -> None:
    many = (pack(Kind.DATA, b"x") + pack(Kind.CUT, b"\0")) * 900
    ended = await heard(pack(Kind.STARTED) + pack(Kind.CUT, b"\0") * 900 + many + pack(Kind.DONE))
    assert isinstance(ended.end, RunnerSucceeded)
    assert ended.data == b"x" * 900
    assert len(ended.cuts) == CUTS_FREE


def test_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        asyncio.run(heard(pack(Kind.STARTED)))
    assert len(os.listdir("/proc/self/fd")) <= before
