"""The agent's side of one runner: feeds it one job, reads its frames as hostile bytes, enforces time and memory, kills it."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import logging
import os
import select
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field

from edif_mesh.domain.attempt import Receipt
from edif_mesh.domain.job import Limits
from edif_mesh.errors import RunnerError, SandboxError
from site_agent.runner.device_usage import SLACK_BYTES, DeviceMeter
from site_agent.runner.events import (
    ResultChunk,
    ResultCut,
    RunnerEvent,
    RunnerFailed,
    RunnerLog,
    RunnerStarted,
    RunnerSucceeded,
)
from site_agent.runner.protocol import (
    HEAD,
    RUNNER_CODES,
    SETUP_CODES,
    Conversation,
    JobHead,
    Kind,
    check_head,
    pack,
    parse_failure,
    printable,
)
from site_agent.runner.usage import Meter

log = logging.getLogger(__name__)

_WATCH_S, _LEAST_WATCH_S = 0.25, 0.02
_WRITES_PER_S = 4 << 30
"""How fast a job can fill memory, for the time to the next look: fewer bytes left, sooner."""
_MAX_THREADS = 1024
_WARM_AFTER_S = 0.1
_GONE_S = 2.0
_VERDICT_S = 120.0
HOST_GONE = "their host is gone"
"""The verdict when nobody is left to look at the weights."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How one payload is to be run; times in ms, sizes in bytes."""

    compressed: bool = False
    env: dict[str, str | None] = field(default_factory=dict)
    limits: Limits = Limits()
    max_payload_bytes: int = 1 << 30
    """Of the payload when decompressed."""
    threads: int = 1
    chunk_bytes: int = 512 << 10
    wire_dtype: str = ""
    """As in `ResultOptions`."""


class Runner:
    """A ready, confined child and the socket it speaks on; it serves one job."""

    def __init__(
        self, sock: socket.socket, pid: int, device: str, pidfd: int = -1, *, checked: bool = False,
        device_meter: DeviceMeter | None = None,
    ) -> None:  # fmt: skip
        """`pidfd` is the runner's to close; by default one of `pid`, as this process counts.

        With `checked` its host looks at the weights once it is dead; no success is told before.
        """
        self._device_meter = device_meter
        self.pid = pid
        self.verdict: asyncio.Future[str] | None = asyncio.get_running_loop().create_future() if checked else None
        """What the host found changed in the weights after the job; empty: nothing."""
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        """Its exit status, set by the host's report; None when the host itself is gone."""
        self._sock, self._device = sock, device
        self._pidfd = pidfd if pidfd >= 0 else os.pidfd_open(pid)
        self._meter = Meter(pid)
        self._killed_because: tuple[str, str] | None = None
        self._began: float | None = None
        self._ended: float | None = None
        self._result_bytes = self._log_bytes = 0
        self._buffer = bytearray(64 << 10)
        self._start = self._end = 0
        self._warming: asyncio.TimerHandle | None = None
        self._wall: asyncio.TimerHandle | None = None

    @property
    def receipt(self) -> Receipt | None:
        """What the job has used so far, or in the end; None when it was given no job."""
        if self._began is None:
            return None
        return Receipt(
            wall_ms=int(((self._ended or time.monotonic()) - self._began) * 1000),
            cpu_ms=self._meter.cpu_ms,
            peak_memory_bytes=self._meter.peak_bytes,
            result_bytes=self._result_bytes,
            device=self._device,
            log_bytes=self._log_bytes,
            device_memory_bytes=self._device_meter.peak_bytes if self._device_meter is not None else 0,
        )

    async def ready(self) -> None:
        """Wait until the child has confined itself; raises SandboxError with its own sentence, RunnerError when it died.

        It warms up when it is not used at once: under load the time is better spent on the jobs themselves.
        """
        try:
            await self._take_meter()
            kind, data = await self._frame()
        except (EOFError, OSError) as error:
            raise RunnerError("A runner died while it confined itself.") from error
        if kind is Kind.FAILED:
            raise SandboxError(parse_failure(data, SETUP_CODES)[1])
        if kind is not Kind.READY:
            raise RunnerError("A runner spoke before it was ready.")
        self._warming = asyncio.get_running_loop().call_later(_WARM_AFTER_S, self.warm_up)

    def has_exited(self, status: int | None, cpu_ms: int = 0, peak_bytes: int = 0) -> None:
        """The host has reaped the child, with what the kernel counted for it; or the host itself is gone (None)."""
        if status is not None and self._began is not None:
            self._meter.final(cpu_ms, peak_bytes)
        if not self.exited.done():
            self.exited.set_result(status)

    def warm_up(self) -> None:
        """Have a waiting child run the warm-up trace, before `run`; done by itself when it is not used at once."""
        with contextlib.suppress(OSError):
            self._sock.send(pack(Kind.WARM))

    def kill(self, code: str, text: str) -> None:
        """End the child at once (SIGKILL); the first reason given is the one that is reported."""
        self._killed_because = self._killed_because or (code, text)
        self._settle()
        self._result_bytes = 0
        self._signal()

    async def gone(self) -> None:
        """Wait until a discarded child is dead and its memory is free; for 2 s at most, and not at all without its host."""
        try:
            async with asyncio.timeout(_GONE_S):
                await asyncio.shield(self.exited)
        except TimeoutError:
            log.error("a killed runner is still there", extra={"pid": self.pid})

    def discard(self) -> None:
        """End the child and release its socket and descriptors; idempotent."""
        self._stay_cold()
        self._settle()
        self._signal()
        self._sock.close()
        self._meter.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    async def run(self, payload: bytes, options: RunOptions) -> AsyncIterator[RunnerEvent]:
        """Run `payload` and yield what happens; exactly one terminal event is the last. The child is dead afterwards."""
        self._stay_cold()
        self._meter.start()
        if self._device_meter is not None:
            self._device_meter.start()
        self._began = time.monotonic()
        limits = options.limits
        self._call_when_too_long(limits.wall_ms)
        watch = asyncio.create_task(self._watch(limits.memory_bytes, cpu_limit_ms(options)))
        failure: tuple[str, str] | None = ("protocol", "The runner ended in the middle of a sentence.")
        terminal: RunnerSucceeded | RunnerFailed
        try:
            sending = asyncio.create_task(self._send(payload, options))
            try:
                async for event in self._events(options):
                    yield event
            except _Ended as end:
                failure = end.failure
            except RunnerError as error:
                failure = ("protocol", str(error))
            except (EOFError, OSError):
                failure = await self._death(options)
            finally:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await sending
            self._settle()
            if failure is not None:
                self._result_bytes = 0
                failure = self._with_use(failure)
            receipt = self.receipt
            assert receipt is not None
            terminal = RunnerSucceeded(receipt) if failure is None else RunnerFailed(*failure, receipt)
        finally:
            if self._wall is not None:
                self._wall.cancel()
            watch.cancel()
            self.discard()
        yield await self._unless_weights_changed(terminal)

    async def _unless_weights_changed(self, terminal: RunnerSucceeded | RunnerFailed) -> RunnerEvent:
        if self.verdict is None:
            return terminal
        try:
            async with asyncio.timeout(_VERDICT_S):
                changed = await asyncio.shield(self.verdict)
        except TimeoutError:
            changed = f"its host did not look at them within {_VERDICT_S:.0f} s"
        if not changed:
            return terminal
        if isinstance(terminal, RunnerFailed) and changed == HOST_GONE:
            return terminal
        self._result_bytes = 0
        receipt = self.receipt
        assert receipt is not None
        return RunnerFailed("weights_changed", changed_sentence(changed), receipt)

    def _stay_cold(self) -> None:
        if self._warming is not None:
            self._warming.cancel()

    # --------------------------------------------------------------------------------------------------------- frames

    async def _send(self, payload: bytes, options: RunOptions) -> None:
        limits = options.limits
        head = JobHead(
            payload_bytes=len(payload),
            compressed=options.compressed,
            env=options.env,
            max_payload_bytes=options.max_payload_bytes,
            memory_bytes=limits.memory_bytes,
            cpu_s=cpu_limit_ms(options) // 1000 + 1,
            result_bytes=limits.result_bytes,
            wire_dtype=options.wire_dtype,
            log_bytes=limits.log_bytes,
            threads=options.threads,
        )
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._sock, pack(Kind.JOB, json.dumps(asdict(head)).encode()))
        await loop.sock_sendall(self._sock, payload)

    async def _events(self, options: RunOptions) -> AsyncIterator[RunnerEvent]:
        talk = Conversation(options.limits.log_bytes, options.limits.result_bytes)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        chunk = _Chunk(options.chunk_bytes)
        while True:
            kind, length = check_head(await self._exactly(HEAD.size))
            talk.accept(kind, length)
            if kind is Kind.DATA:
                async for event in self._data(length, chunk):
                    yield event
                self._meter.read()
                continue
            data = await self._exactly(length)
            if kind is Kind.STARTED:
                yield RunnerStarted()
            elif kind is Kind.LOG:
                self._log_bytes += length
                if text := printable(decoder.decode(data)):
                    yield RunnerLog(text)
            elif kind is Kind.CUT:
                if talk.cut():
                    if chunk.filled:
                        yield ResultChunk(chunk.take())
                    yield ResultCut(data[0])
            else:
                if kind is Kind.DONE and chunk.filled:
                    yield ResultChunk(chunk.take())
                raise _Ended(parse_failure(data, RUNNER_CODES) if kind is Kind.FAILED else None)

    async def _data(self, length: int, chunk: _Chunk) -> AsyncIterator[RunnerEvent]:
        """Read a DATA frame straight into chunks; yield those that are full."""
        loop = asyncio.get_running_loop()
        self._result_bytes += length
        while length > 0:
            room = chunk.room(length)
            held = min(len(room), self._end - self._start)
            if held:
                room[:held] = self._buffer[self._start : self._start + held]
                self._start += held
                count = held
            else:
                count = await loop.sock_recv_into(self._sock, room)
                if count == 0:
                    raise EOFError
            length -= count
            chunk.filled += count
            if chunk.filled == chunk.size:
                yield ResultChunk(chunk.take())

    async def _take_meter(self) -> None:
        """Take the first frame with its descriptor; a runner that could not open it speaks of something else first."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._sock, HEAD.size, 1)
                break
            except BlockingIOError:
                await readable(self._sock)
        for descriptor in descriptors:
            self._meter.adopt(descriptor)
        if not data:
            raise EOFError
        self._buffer[: len(data)] = data
        self._start, self._end = 0, len(data)
        if descriptors:
            await self._frame()

    async def _frame(self) -> tuple[Kind, bytes]:
        kind, length = check_head(await self._exactly(HEAD.size))
        return kind, await self._exactly(length)

    async def _exactly(self, size: int) -> bytes:
        """Return the next `size` bytes (at most MAX_FRAME_BYTES, checked by the caller)."""
        loop = asyncio.get_running_loop()
        if size > len(self._buffer):
            self._buffer.extend(bytes(size - len(self._buffer)))
        while self._end - self._start < size:
            if self._start and self._start + size > len(self._buffer):
                kept = self._buffer[self._start : self._end]
                self._buffer[: len(kept)] = kept
                self._start, self._end = 0, len(kept)
            elif self._start == self._end:
                self._start = self._end = 0
            count = await loop.sock_recv_into(self._sock, memoryview(self._buffer)[self._end :])
            if count == 0:
                raise EOFError
            self._end += count
        data = bytes(memoryview(self._buffer)[self._start : self._start + size])
        self._start += size
        return data

    # --------------------------------------------------------------------------------------------------------- limits

    async def _watch(self, most_bytes: int, most_cpu_ms: int) -> None:
        """Kill the child beyond what limits of its own cannot see: pages it copies by writing to weights, threads, CPU time.

        What it can take between two looks is bounded: new memory by its address space (`child._set_limits`), copies by
        the size of the weights, both by what it can write in at most 0.25 s, and in less the nearer it is to its limit.
        """
        meter, wait_s = self._meter, _WATCH_S
        while True:
            await asyncio.sleep(wait_s)
            if not meter.read():
                continue
            if meter.should_look(most_bytes):
                await asyncio.to_thread(meter.look)
            if (on_device := self._device_meter) is not None:
                await asyncio.to_thread(on_device.read)
            if meter.memory_bytes > most_bytes:
                self.kill("out_of_memory", _memory_sentence(meter.memory_bytes, most_bytes))
            elif on_device is not None and on_device.memory_bytes > most_bytes + SLACK_BYTES:
                self.kill("out_of_memory", _memory_sentence(on_device.memory_bytes, most_bytes, "memory on its GPU"))
            elif meter.last.threads > _MAX_THREADS:
                text = f"The job started {meter.last.threads} threads; {_MAX_THREADS} are allowed. Start fewer."
                self.kill("too_many_threads", text)
            elif meter.cpu_ms > most_cpu_ms:
                self.kill("cpu_time", _cpu_sentence(meter.cpu_ms, most_cpu_ms))
            left_s = (most_bytes - meter.memory_bytes) / _WRITES_PER_S
            wait_s = min(_WATCH_S, max(_LEAST_WATCH_S, left_s))

    def _call_when_too_long(self, limit_ms: int) -> None:
        assert self._began is not None
        left_s = limit_ms / 1000 - (time.monotonic() - self._began)
        self._wall = asyncio.get_running_loop().call_later(left_s, self._too_long, limit_ms)

    def _too_long(self, limit_ms: int) -> None:
        assert self._began is not None
        if (time.monotonic() - self._began) * 1000 < limit_ms:  # the event loop's own clock runs behind
            self._call_when_too_long(limit_ms)
            return
        text = (
            f"The job ran for {time.monotonic() - self._began:,.1f} s; its limit is {limit_ms / 1000:,.1f} s, so it was stopped. "
            "Do less in one block, or order a higher wall_ms."
        )
        self.kill("wall_time", text)

    def _settle(self) -> None:
        """Read for the last time what the job used, while there is a process to read."""
        if self._began is None or self._ended is not None:
            return
        self._ended = time.monotonic()
        if self._device_meter is not None:
            self._device_meter.read()
        if self._meter.read() and self._meter.worth_a_last_look():
            self._meter.look()

    def _with_use(self, failure: tuple[str, str]) -> tuple[str, str]:
        """Add to a runner's word that memory ran out what the kernel has counted."""
        code, text = failure
        if code != "out_of_memory" or self._killed_because is not None:
            return failure
        return code, f"{text} It had {self._meter.peak_bytes / 1e9:,.2f} GB at its highest."

    async def _death(self, options: RunOptions) -> tuple[str, str]:
        """The child is gone without a word: say why, as far as it is known."""
        if self._killed_because is not None:
            return self._killed_because
        try:
            status = await asyncio.wait_for(asyncio.shield(self.exited), 2)
            if status is None:  # the host is gone; its runners end a moment later
                await self._dies()
        except TimeoutError:
            status = None
        if status is None and not self._is_dead():
            return "protocol", "The runner closed its socket and ran on; it was stopped."
        if status is None:
            return "host_lost", "The model's host process died under the job."
        if status == -signal.SIGXCPU:
            return "cpu_time", _cpu_sentence(self._meter.cpu_ms, cpu_limit_ms(options))
        if status == -signal.SIGKILL:
            return "runner_crashed", "The runner was killed from outside (SIGKILL), most likely because memory ran out."
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return "runner_crashed", f"The runner died without a result ({name})."

    async def _dies(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GONE_S):
                await readable(self._pidfd)

    def _is_dead(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)  # readable once it has ended
        return bool(poll.poll(0))

    def _signal(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def cpu_limit_ms(options: RunOptions) -> int:
    """Return the processor time that a job may use: its own limit, or what its threads can use in its wall time."""
    limits = options.limits
    return limits.cpu_ms or limits.wall_ms * max(1, options.threads) + 1000


async def readable(descriptor: socket.socket | int) -> None:
    """Wait until there is something to read: of a socket, also its end; of a pidfd, that its process has ended."""
    loop, there = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, there.set)
    try:
        await there.wait()
    finally:
        loop.remove_reader(descriptor)


def _memory_sentence(used: int, limit: int, what: str = "memory") -> str:
    return (
        f"The job used {used / 1e9:,.2f} GB of {what}; its limit is {limit / 1e9:,.2f} GB (beyond the model's weights; "
        "weights that it changes count), so it was stopped. Keep or save less at once, or order a higher memory_bytes."
    )


def changed_sentence(changed: str) -> str:
    """Return what the weights check says to a job that ended, or was stopped, when it had found a difference."""
    return (
        f"The site's copy of the model's weights was not intact after this job ({changed}), so its result was withheld. The site "
        "loads the model anew; the job may run again, here or elsewhere."
    )


def _cpu_sentence(used_ms: int, limit_ms: int) -> str:
    return (
        f"The job used {used_ms / 1000:,.1f} s of processor time over all its threads; its limit is {limit_ms / 1000:,.1f} s, "
        "so it was stopped. Do less in one block, or order a higher cpu_ms."
    )


class _Chunk:
    """The chunk that is being filled."""

    def __init__(self, size: int) -> None:
        self.size, self.filled = size, 0
        self._data = bytearray(0)

    def room(self, most: int) -> memoryview:
        """Return where the next bytes go, at most `most`; a new buffer only when there is something to put into it."""
        if not self.filled:
            self._data = bytearray(self.size)
        return memoryview(self._data)[self.filled : self.filled + most]

    def take(self) -> memoryview:
        """Return what was filled, and begin anew."""
        data, self._data, filled, self.filled = self._data, bytearray(0), self.filled, 0
        view = memoryview(data)[:filled]
        return view if filled > self.size // 2 else memoryview(bytes(view))  # a little does not keep a whole buffer


class _Ended(Exception):
    """The runner's own terminal frame; leaves the frame loop."""

    def __init__(self, failure: tuple[str, str] | None) -> None:
        super().__init__()
        self.failure = failure
