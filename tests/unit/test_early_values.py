"""Values that leave a job while it runs, and what becomes of them when they change afterwards."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from edif_mesh.results.archive import leaf_value, plan_rest, read
from edif_mesh.results.archive_records import Leaf, RecordReader
from edif_mesh.results.archive_sent import Sent
from site_agent.runner.early import EarlySender, FrameSender
from site_agent.runner.protocol import HEAD, Kind
from tests.same_values import assert_same


class Agent:
    """The other end of a runner's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.archive = bytearray()
        self.leaves: list[tuple[Leaf, Any]] = []
        self._sock, self._changed = sock, threading.Condition()
        self._reader = RecordReader(lambda start, size: bytes(self.archive[start : start + size]))
        self._thread = threading.Thread(target=self._hear)
        self._thread.start()

    def _hear(self) -> None:
        while head := self._sock.recv(HEAD.size, socket.MSG_WAITALL):
            kind, length = HEAD.unpack(head)
            data = self._sock.recv(length, socket.MSG_WAITALL)
            with self._changed:
                if kind == Kind.DATA:
                    self.archive += data
                for leaf in self._reader.leaves(len(self.archive)):
                    storages = [bytes(self.archive[at : at + size]) for at, size in leaf.storages]
                    self.leaves.append((leaf, leaf_value(leaf, storages)))
                self._changed.notify_all()

    def until(self, there: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(there, 20)

    def join(self) -> None:
        self._thread.join(20)


class Runner:
    """What the child has: a sender, and in the end the values."""

    def __init__(self, sock: socket.socket, agent: Agent, most_bytes: int = 1 << 30) -> None:
        self._sock, self.agent, self.sent, self.frames = sock, agent, Sent(), FrameSender(sock)
        self.early = EarlySender(self.frames, self.sent, most_bytes)

    def finish(self, **values: Any) -> bytes:
        self.early.end()
        self.frames.archive(iter(plan_rest(values, self.sent).parts))
        self._sock.shutdown(socket.SHUT_WR)
        self.agent.join()
        return bytes(self.agent.archive)


@pytest.fixture
def runner() -> Iterator[Runner]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Runner(ours, Agent(theirs))


def names(runner: Runner) -> list[str]:
    return [leaf.name for leaf, _ in runner.agent.leaves]


def test_a_saved_tensor_leaves_before_the_end_and_is_sent_once(runner: Runner) -> None:
    large, small = torch.randn(200_000), torch.tensor([1.5])
    runner.early.saved(large, "large")
    runner.early.saved(small, "small")
    runner.agent.until(lambda: len(runner.agent.leaves) == 2)
    assert names(runner) == ["large", "small"]
    assert_same(runner.agent.leaves[0][1], large)
    data = runner.finish(large=large, small=small)
    assert_same(read(data), {"large": large, "small": small})
    assert len(data) < large.nbytes + 4096


def test_what_is_appended_later_to_a_saved_list_leaves_too(runner: Runner) -> None:
    acts: list[torch.Tensor] = []
    runner.early.saved(acts, "acts")
    for number in range(5):
        acts.append(torch.full((1000,), float(number)))
        runner.agent.until(lambda: len(runner.agent.leaves) == len(acts))
    assert names(runner) == [f"acts[{number}]" for number in range(5)]
    data = runner.finish(acts=acts)
    assert_same(read(data), {"acts": acts})
    assert len(data) < 5 * 4000 + 4096


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_(1),
        lambda t: t.numpy().sort(),
        lambda t: t.data.zero_(),
        lambda t: t.view(-1, 2)[7].fill_(9),
        lambda t: t.copy_(t.flip(0).clone()),
    ],
)
def test_a_value_that_changes_after_it_has_left_arrives_as_it_is_at_the_end(
    runner: Runner, change: Callable[[torch.Tensor], Any]
) -> None:
    tensor = torch.randn(100_000)
    runner.early.saved(tensor, "t")
    runner.agent.until(lambda: len(runner.agent.leaves) == 1)
    runner.early.end()
    change(tensor)
    assert_same(read(runner.finish(t=tensor)), {"t": tensor})


def test_another_value_at_the_same_place_in_memory_is_not_taken_for_the_first(runner: Runner) -> None:
    memory = bytearray(400_000)
    first = torch.frombuffer(memory, dtype=torch.float32)
    runner.early.saved(first, "first")
    runner.agent.until(lambda: len(runner.agent.leaves) == 1)
    runner.early.end()
    del first
    memory[:] = bytes([1]) * len(memory)
    second = torch.frombuffer(memory, dtype=torch.int32)
    assert_same(read(runner.finish(second=second)), {"second": second.clone()})


def test_views_that_share_memory_still_share_it_when_one_of_them_has_left(runner: Runner) -> None:
    base = torch.randn(1000, 100)
    runner.early.saved(base[:500], "half")
    runner.early.saved(base, "base")
    runner.agent.until(lambda: "base" in names(runner))
    back = read(runner.finish(half=base[:500], base=base))
    assert_same(back, {"half": base[:500], "base": base})
    assert back["half"].untyped_storage().data_ptr() == back["base"].untyped_storage().data_ptr()


def test_a_tensor_that_the_job_has_let_go_is_not_kept_alive(runner: Runner) -> None:
    kept = torch.randn(10)
    runner.early.end()
    runner.early.saved(torch.randn(1000), "gone")
    runner.early.saved(kept, "kept")
    assert [find() is not None for _, find in runner.early._saved] == [False, True]
    assert_same(read(runner.finish(kept=kept)), {"kept": kept})


def test_no_more_than_allowed_leaves_early() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        runner = Runner(ours, Agent(theirs), most_bytes=10_000)
        large, small = torch.randn(5000), torch.randn(10)
        runner.early.saved(large, "large")
        runner.early.saved(small, "small")
        runner.agent.until(lambda: len(runner.agent.leaves) == 1)
        assert names(runner) == ["small"]
        assert_same(read(runner.finish(large=large, small=small)), {"large": large, "small": small})


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(4, 4).T,
        torch.randn(3, dtype=torch.cfloat).conj(),
        torch.tensor([True]),
        torch.empty(0),
        "text",
        None,
    ],
)
def test_what_an_archive_lays_out_otherwise_waits_for_the_end(runner: Runner, value: Any) -> None:
    then = torch.ones(3)
    runner.early.saved([value], "value")
    runner.early.saved(then, "then")
    runner.agent.until(lambda: len(runner.agent.leaves) == 1)
    assert names(runner) == ["then"]
    assert_same(read(runner.finish(value=value, then=then)), {"value": value, "then": then})
