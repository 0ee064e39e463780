"""The agent's side of one runner: feeds it one job, reads its frames as hostile bytes, enforces time and memory, kills it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
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
from site_agent.runner.protocol import HEAD, SIZE, JobHead, Kind, check_head, pack, parse_done, parse_failure

_WATCH_S = 0.25
_PAGE = resource.getpagesize()


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

    def __init__(self, sock: socket.socket, pid: int, device: str) -> None:
        self.pid = pid
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._sock, self._device = sock, device
        self._pidfd = os.pidfd_open(pid)
        self._killed_because: tuple[str, str] | None = None
        self._base_bytes = 0
        self._peak_bytes = 0
        self._buffer = bytearray(64 << 10)
        self._start = self._end = 0

    async def ready(self) -> None:
        """Wait until the child has confined itself and warmed up; raises RunnerError with its own sentence."""
        try:
            kind, data = await self._frame()
        except (EOFError, OSError) as error:
            raise RunnerError("A runner died while it confined itself.") from error
        if kind is Kind.FAILED:
            raise RunnerError(parse_failure(data)[1])
        if kind is not Kind.READY:
            raise RunnerError("A runner spoke before it was ready.")
        self._base_bytes = self._resident_bytes("VmRSS")

    def kill(self, code: str, text: str) -> None:
        """End the child at once (SIGKILL); the first reason given is the one that is reported."""
        self._killed_because = self._killed_because or (code, text)
        self._signal()

    def discard(self) -> None:
        """End the child and release its socket; idempotent."""
        self._signal()
        self._sock.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    async def run(self, payload: bytes, options: RunOptions) -> AsyncIterator[RunnerEvent]:
        """Run `payload` and yield what happens; exactly one terminal event is the last. The child is dead afterwards."""
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        limits = options.limits
        wall = loop.call_later(
            limits.wall_ms / 1000,
            self.kill,
            "wall_time",
            f"The job ran longer than its limit of {limits.wall_ms / 1000:,.0f} s and was stopped.",
        )
        watch = asyncio.create_task(self._watch(limits.memory_bytes))
        cpu_ms = result_bytes = 0
        terminal: RunnerEvent | None = None
        try:
            sending = asyncio.create_task(self._send(payload, options))
            try:
                async for event in self._events(options):
                    if isinstance(event, ResultOpened):
                        result_bytes = event.total_bytes
                    yield event
            except _Ended as end:
                cpu_ms, failure = end.cpu_ms, end.failure
            except RunnerError as error:
                failure = ("protocol", str(error))
            except (EOFError, OSError):
                failure = await self._death()
            finally:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await sending
            self._peak_bytes = max(self._peak_bytes, self._resident_bytes("VmHWM") - self._base_bytes)
            receipt = Receipt(
                wall_ms=int((time.monotonic() - began) * 1000),
                cpu_ms=cpu_ms,
                peak_memory_bytes=max(0, self._peak_bytes),
                result_bytes=result_bytes if failure is None else 0,
                device=self._device,
            )
            terminal = RunnerSucceeded(receipt) if failure is None else RunnerFailed(*failure, receipt)
        finally:
            wall.cancel()
            watch.cancel()
            self.discard()
        yield terminal

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
        log_left = options.limits.log_bytes + 4096
        while True:
            kind, data = await self._frame()
            if kind is Kind.STARTED:
                yield RunnerStarted()
            elif kind is Kind.LOG:
                log_left -= len(data)
                if log_left < 0:
                    raise RunnerError("The runner printed beyond its limit.")
                yield RunnerLog(data.decode("utf-8", "replace"))
            elif kind is Kind.RESULT:
                (total,) = SIZE.unpack(data)
                if total > options.limits.result_bytes:
                    raise RunnerError("The runner announced a result beyond its limit.")
                self._peak_bytes = max(self._peak_bytes, self._resident_bytes("VmHWM") - self._base_bytes)
                yield ResultOpened(total)
                async for event in self._chunks(total, options.chunk_bytes):
                    yield event
            elif kind is Kind.DONE:
                raise _Ended(parse_done(data), None)
            elif kind is Kind.FAILED:
                raise _Ended(0, parse_failure(data))
            else:
                raise RunnerError(f"The runner sent {kind.name} in the middle of a job.")

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

    async def _watch(self, most: int) -> None:
        """Kill the child when its resident memory has grown beyond `most`: RLIMIT_AS does not see copied pages."""
        while True:
            await asyncio.sleep(_WATCH_S)
            grown = self._resident_bytes("VmRSS") - self._base_bytes
            self._peak_bytes = max(self._peak_bytes, grown)
            if grown > most:
                self.kill(
                    "out_of_memory",
                    f"The job's memory grew to {grown / 1e9:,.2f} GB; its limit is {most / 1e9:,.2f} GB (beyond the weights).",
                )

    def _resident_bytes(self, key: str) -> int:
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{self.pid}/status") as file:
            for line in file:
                if line.startswith(key):
                    return int(line.split()[1]) * 1024
        return 0

    async def _death(self) -> tuple[str, str]:
        """The child is gone without a word: say why, as far as it is known."""
        if self._killed_because is not None:
            return self._killed_because
        try:
            status = await asyncio.wait_for(asyncio.shield(self.exited), 2)
        except TimeoutError:
            return "host_lost", "The model's host process died under the job."
        if status == -signal.SIGXCPU:
            return "cpu_time", "The job used more processor time than its limit and was stopped."
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return "runner_crashed", f"The runner died without a result ({name})."

    def _signal(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class _Ended(Exception):
    """The runner's own terminal frame; leaves the frame loop."""

    def __init__(self, cpu_ms: int, failure: tuple[str, str] | None) -> None:
        super().__init__()
        self.cpu_ms, self.failure = cpu_ms, failure
