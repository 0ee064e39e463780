"""The agent's side of one runner: feeds it one job, reads its frames as hostile bytes, enforces time and memory, kills it."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field

from edif_mesh.domain.attempt import Receipt
from edif_mesh.domain.job import Limits
from edif_mesh.errors import RunnerError
from site_agent.runner.events import (
    ResultChunk,
    ResultOpened,
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

_WATCH_S = 0.25
_MAX_THREADS = 1024
_WARM_AFTER_S = 0.1


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


class Runner:
    """A ready, confined child and the socket it speaks on; it serves one job."""

    def __init__(self, sock: socket.socket, pid: int, device: str, pidfd: int = -1) -> None:
        """`pidfd` is the runner's to close; by default one of `pid`, as this process counts."""
        self.pid = pid
        self.exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        """Its exit status, set by the host's report; None when the host itself is gone."""
        self._sock, self._device = sock, device
        self._pidfd = pidfd if pidfd >= 0 else os.pidfd_open(pid)
        self._killed_because: tuple[str, str] | None = None
        self._base = _Usage()
        self._base_peak_bytes = 0
        self._peak_bytes = 0
        self._cpu_ms = 0
        self._buffer = bytearray(64 << 10)
        self._start = self._end = 0
        self._warming: asyncio.TimerHandle | None = None

    async def ready(self) -> None:
        """Wait until the child has confined itself; raises RunnerError with its own sentence.

        It warms up when it is not used at once: under load the time is better spent on the jobs themselves.
        """
        try:
            kind, data = await self._frame()
        except (EOFError, OSError) as error:
            raise RunnerError("A runner died while it confined itself.") from error
        if kind is Kind.FAILED:
            raise RunnerError(parse_failure(data, SETUP_CODES)[1])
        if kind is not Kind.READY:
            raise RunnerError("A runner spoke before it was ready.")
        self._warming = asyncio.get_running_loop().call_later(_WARM_AFTER_S, self.warm_up)

    def warm_up(self) -> None:
        """Have a waiting child run the warm-up trace, before `run`; done by itself when it is not used at once."""
        with contextlib.suppress(OSError):
            self._sock.send(pack(Kind.WARM))

    def kill(self, code: str, text: str) -> None:
        """End the child at once (SIGKILL); the first reason given is the one that is reported."""
        self._killed_because = self._killed_because or (code, text)
        self._signal()

    def discard(self) -> None:
        """End the child and release its socket; idempotent."""
        self._stay_cold()
        self._signal()
        self._sock.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    async def run(self, payload: bytes, options: RunOptions) -> AsyncIterator[RunnerEvent]:
        """Run `payload` and yield what happens; exactly one terminal event is the last. The child is dead afterwards."""
        self._stay_cold()
        self._base = self._usage() or _Usage()
        self._base_peak_bytes = self._base.resident_bytes
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        limits = options.limits
        wall = loop.call_later(
            limits.wall_ms / 1000,
            self.kill,
            "wall_time",
            f"The job ran longer than its limit of {limits.wall_ms / 1000:,.0f} s and was stopped.",
        )
        cpu_limit_ms = max(1000, limits.wall_ms * options.threads + 1000)
        watch = asyncio.create_task(self._watch(limits.memory_bytes, cpu_limit_ms))
        result_bytes = 0
        failure: tuple[str, str] | None = ("protocol", "The runner ended in the middle of a sentence.")
        terminal: RunnerEvent | None = None
        try:
            sending = asyncio.create_task(self._send(payload, options))
            try:
                async for event in self._events(options):
                    if isinstance(event, ResultOpened):
                        result_bytes = event.total_bytes
                    yield event
            except _Ended as end:
                failure = end.failure
            except RunnerError as error:
                failure = ("protocol", str(error))
            except (EOFError, OSError):
                failure = await self._death()
            finally:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await sending
            self._measure()
            receipt = Receipt(
                wall_ms=int((time.monotonic() - began) * 1000),
                cpu_ms=self._cpu_ms,
                peak_memory_bytes=self._peak_bytes,
                result_bytes=result_bytes if failure is None else 0,
                device=self._device,
            )
            terminal = RunnerSucceeded(receipt) if failure is None else RunnerFailed(*failure, receipt)
        finally:
            wall.cancel()
            watch.cancel()
            self.discard()
        yield terminal

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
            cpu_s=max(1, limits.wall_ms * options.threads // 1000 + 1),
            result_bytes=limits.result_bytes,
            log_bytes=limits.log_bytes,
            threads=options.threads,
        )
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._sock, pack(Kind.JOB, json.dumps(asdict(head)).encode()))
        await loop.sock_sendall(self._sock, payload)

    async def _events(self, options: RunOptions) -> AsyncIterator[RunnerEvent]:
        talk = Conversation(options.limits.log_bytes, options.limits.result_bytes)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            kind, length = check_head(await self._exactly(HEAD.size))
            talk.accept(kind, length)
            data = await self._exactly(length)
            if kind is Kind.STARTED:
                yield RunnerStarted()
            elif kind is Kind.LOG:
                if text := printable(decoder.decode(data)):
                    yield RunnerLog(text)
            elif kind is Kind.RESULT:
                total = talk.result_bytes(data)
                self._measure()
                yield ResultOpened(total)
                async for event in self._chunks(total, options.chunk_bytes):
                    yield event
            else:
                raise _Ended(parse_failure(data, RUNNER_CODES) if kind is Kind.FAILED else None)

    async def _chunks(self, total: int, size: int) -> AsyncIterator[RunnerEvent]:
        loop = asyncio.get_running_loop()
        while total > 0:
            chunk = bytearray(min(size, total))
            view = memoryview(chunk)
            filled = min(len(chunk), self._end - self._start)
            view[:filled] = self._buffer[self._start : self._start + filled]
            self._start += filled
            while filled < len(chunk):
                count = await loop.sock_recv_into(self._sock, view[filled:])
                if count == 0:
                    raise EOFError
                filled += count
            total -= len(chunk)
            yield ResultChunk(chunk)

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
        """Kill the child beyond what limits of its own can see: pages it copies by writing to weights, threads, CPU time."""
        while True:
            await asyncio.sleep(_WATCH_S)
            usage = self._measure()
            grown = usage.anonymous_bytes - self._base.anonymous_bytes
            if grown > most_bytes:
                self.kill(
                    "out_of_memory",
                    f"The job's memory grew to {grown / 1e9:,.2f} GB; its limit is {most_bytes / 1e9:,.2f} GB (beyond the weights).",
                )
            elif usage.threads > _MAX_THREADS:
                self.kill("too_many_threads", f"The job started {usage.threads} threads; {_MAX_THREADS} are allowed.")
            elif self._cpu_ms > most_cpu_ms:
                self.kill("cpu_time", _CPU_SENTENCE)

    def _measure(self) -> _Usage:
        """Read what the child uses from the kernel (never from the child) and keep the highest."""
        usage = self._usage()
        if usage is None:
            return self._base
        grown = usage.anonymous_bytes - self._base.anonymous_bytes
        peak = usage.peak_bytes - self._base_peak_bytes
        self._peak_bytes = max(self._peak_bytes, grown, peak)
        self._cpu_ms = max(self._cpu_ms, usage.cpu_ms - self._base.cpu_ms)
        return usage

    def _usage(self) -> _Usage | None:
        values: dict[str, int] = {}
        try:
            with open(f"/proc/{self.pid}/status") as file:
                for line in file:
                    name, _, value = line.partition(":")
                    if name in ("VmRSS", "VmHWM", "RssAnon", "Threads"):
                        values[name] = int(value.split()[0])
            cpu_ns = time.clock_gettime_ns(
                ~self.pid << 3 | 2
            )  # CPU clock of another process, see clock_getcpuclockid(3)
        except (OSError, ValueError):
            return None
        if len(values) < 4:  # a zombie has no memory
            return None
        kib = 1024
        return _Usage(
            resident_bytes=values["VmRSS"] * kib,
            peak_bytes=values["VmHWM"] * kib,
            anonymous_bytes=values["RssAnon"] * kib,
            threads=values["Threads"],
            cpu_ms=cpu_ns // 1_000_000,
        )

    async def _death(self) -> tuple[str, str]:
        """The child is gone without a word: say why, as far as it is known."""
        if self._killed_because is not None:
            return self._killed_because
        try:
            status = await asyncio.wait_for(asyncio.shield(self.exited), 2)
        except TimeoutError:
            status = None
        if status is None and not self._is_dead():
            return "protocol", "The runner closed its socket and ran on; it was stopped."
        if status is None:
            return "host_lost", "The model's host process died under the job."
        if status == -signal.SIGXCPU:
            return "cpu_time", _CPU_SENTENCE
        if status == -signal.SIGKILL:
            return "runner_crashed", "The runner was killed from outside (SIGKILL), most likely because memory ran out."
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return "runner_crashed", f"The runner died without a result ({name})."

    def _is_dead(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)  # readable once it has ended
        return bool(poll.poll(0))

    def _signal(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


_CPU_SENTENCE = "The job used more processor time than its limit and was stopped."


@dataclass(frozen=True, slots=True)
class _Usage:
    """What the kernel says of a process."""

    resident_bytes: int = 0
    peak_bytes: int = 0
    anonymous_bytes: int = 0
    threads: int = 0
    cpu_ms: int = 0


class _Ended(Exception):
    """The runner's own terminal frame; leaves the frame loop."""

    def __init__(self, failure: tuple[str, str] | None) -> None:
        super().__init__()
        self.failure = failure
