"""The agent's side of a model host: starts it, keeps ready runners, lends them, notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

from edif_mesh.domain.site import SandboxProfile
from edif_mesh.errors import ModelLoadError, NoRunnerError, RunnerError, SandboxError
from site_agent.hardware import GpuProcesses
from site_agent.hosting.process import HostSettings, command, environment, readable_folders
from site_agent.hosting.progress import LoadingProgress
from site_agent.hosting.spec import HostFacts, ModelSpec
from site_agent.runner.device_usage import DeviceMeter
from site_agent.runner.selftest import deviation, pid_of
from site_agent.runner.supervisor import HOST_GONE, Runner, changed_sentence, readable

log = logging.getLogger(__name__)

_SOCKET_BUFFER = 4 << 20
_SETUP_FAILURES = 3
"""Sandboxes refused in a row after which the host is given up."""
_DEATHS = 10
"""Runners in a row that could not be made, the last of which died before it was ready, after which the host is given up."""
_PATIENCE = 5
"""So many in a row (3 s), and who waits for a runner is told to go elsewhere; the host goes on trying."""
_LEAST_BACKOFF_S, _MOST_BACKOFF_S = 0.1, 5.0
_READY_S = 60.0
_END_S = 10.0
_DIGEST_S = 600.0
_CHECK_S = 60.0
"""The weights check is bound by memory: 140 GB take a GPU far below a second."""


class ModelHost:
    """One loaded model and the ready runners forked from it. Made by `start`; ends with `close` or with `closed`."""

    def __init__(self, spec: ModelSpec, settings: HostSettings) -> None:
        self.spec, self._settings = spec, settings
        self.facts: HostFacts
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.alarm = ""
        """Why an operator should look: the weights check has found a difference, for which this host was ended."""
        self._process: asyncio.subprocess.Process
        self._control: socket.socket
        self._unborn: deque[socket.socket] = deque()
        self._children: dict[int, Runner] = {}
        self._ready: asyncio.Queue[Runner] = asyncio.Queue()
        self._waiting = 0
        self._pidfd = -1
        self._failures = self._refusals = 0
        self._refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Resolved, and replaced, when the machine has refused runners for too long."""
        self._backoff: asyncio.TimerHandle | None = None
        self._gpu_memory = GpuProcesses()
        self._checking = asyncio.Lock()
        self._checked: asyncio.Future[str] | None = None
        self._digest: asyncio.Future[dict[str, Any]] | None = None
        self._digesting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls, spec: ModelSpec, settings: HostSettings, on_progress: Callable[[str], None] = lambda text: None
    ) -> ModelHost:
        """Start the process and load; raises ModelLoadError with the host's own sentence."""
        if settings.sandbox is SandboxProfile.STRICT and not settings.sandbox_command:
            raise ModelLoadError(f"{spec.repo_id} was not loaded: there is no sandbox_command to run it in.")
        host = cls(spec, settings)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        host._control = ours
        ours.setblocking(False)
        readable = readable_folders(spec, settings.hf_cache)
        log = open(settings.log_file, "ab") if settings.log_file else None  # noqa: SIM115
        try:
            host._process = await asyncio.create_subprocess_exec(
                *command(settings, theirs.fileno(), readable, spec),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log or asyncio.subprocess.DEVNULL,
                stderr=log or asyncio.subprocess.DEVNULL,
                env=environment(settings, spec),
                start_new_session=True,
            )
        finally:
            theirs.close()
            if log:
                log.close()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(ours, json.dumps({"spec": asdict(spec), "readable": readable}).encode())
        try:
            await asyncio.wait_for(host._loaded(on_progress), settings.load_timeout_s)
        except BaseException as error:
            await host.close()
            if isinstance(error, TimeoutError):
                raise ModelLoadError(
                    f"The model {spec.repo_id} was not loaded within {settings.load_timeout_s:.0f} s."
                ) from error
            raise
        host._spawn(host._listen())
        for _ in range(settings.ready_children):
            host._fork()
        return host

    @property
    def ready(self) -> int:
        """How many runners wait for a job."""
        return self._ready.qsize()

    async def lend(self) -> Runner:
        """Return a ready runner; `replenish`, when it has ended, has the next one forked.

        Raises RunnerError when the host is gone, NoRunnerError when the machine has refused it processes for seconds.
        """
        while True:
            runner = await self._next_ready()
            if not runner.exited.done():
                return runner
            runner.discard()  # it died while it waited

    async def _next_ready(self) -> Runner:
        if self.closed.done():
            raise RunnerError(self.closed.result())
        self._waiting += 1
        if self._ready.empty() and len(self._unborn) + self._warming < self._waiting:
            self._fork()
        getting = asyncio.ensure_future(self._ready.get())
        refused = self._refused
        either: set[asyncio.Future[Any]] = {getting, self.closed, refused}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if getting.done():  # nobody will take it
                self._ready.put_nowait(getting.result())
            raise
        finally:
            self._waiting -= 1
            getting.cancel()
        if not getting.done() or getting.cancelled():
            raise RunnerError(self.closed.result()) if self.closed.done() else NoRunnerError(refused.result())
        return getting.result()

    def replenish(self) -> None:
        """Fork until the wanted number of runners is ready or on its way; called when a job has ended."""
        missing = self._settings.ready_children - self._ready.qsize() - len(self._unborn) - self._warming
        for _ in range(max(0, missing)):
            self._fork()

    async def weights_digest(self) -> str:
        """Return the SHA-256 over the weights as the host has them now. Raises RunnerError with the reason.

        A child of the host reads every byte of them: not for every job of a large model.
        """
        async with self._digesting:
            if self.closed.done():
                raise RunnerError(self.closed.result())
            self._digest = asyncio.get_running_loop().create_future()
            await asyncio.get_running_loop().sock_sendall(self._control, b"digest")
            either: set[asyncio.Future[Any]] = {self._digest, self.closed}
            await asyncio.wait(either, timeout=_DIGEST_S, return_when=asyncio.FIRST_COMPLETED)
            if not self._digest.done():
                raise RunnerError(f"The weights of {self.spec.repo_id} could not be read: no answer of the host.")
            answer = self._digest.result()
            if not answer["digest"]:
                raise RunnerError(f"The weights of {self.spec.repo_id} could not be read: {answer['why']}.")
            return str(answer["digest"])

    async def check_weights(self) -> str:
        """Return where the shared weights are not what they were at load; empty when they are, and where none are shared.

        Done by itself after every job. A difference ends the host: what it still held has run, or would, on wrong weights.
        """
        if not self.facts.sharing:
            return ""
        async with self._checking:
            if self.closed.done():
                return self.closed.result()
            self._checked = asyncio.get_running_loop().create_future()
            await asyncio.get_running_loop().sock_sendall(self._control, b"check")
            either: set[asyncio.Future[Any]] = {self._checked, self.closed}
            await asyncio.wait(either, timeout=_CHECK_S, return_when=asyncio.FIRST_COMPLETED)
            if self.closed.done():
                return self.closed.result()
            changed = self._checked.result() if self._checked.done() else f"they could not be read in {_CHECK_S:.0f} s"
            if changed:
                self._alarm(changed)
            return changed

    def _alarm(self, changed: str) -> None:
        log.error("weights changed", extra={"model": self.spec.repo_id, "text": changed})
        self.alarm = (
            f"ALARM: the weights of {self.spec.repo_id} were not what they were at load ({changed}). Its runners were stopped, results "
            "of the jobs on it were withheld, and the model is loaded anew."
        )
        for runner in self._children.values():
            runner.kill("weights_changed", changed_sentence(changed))
        self._end(self.alarm)
        while not self._ready.empty():
            self._ready.get_nowait().discard()

    async def _verdict(self, runner: Runner) -> None:
        """A runner that had a job is dead: only now can nothing of it change the weights any more."""
        assert runner.verdict is not None
        changed = HOST_GONE
        try:
            with contextlib.suppress(OSError):
                changed = await self.check_weights()
        finally:  # also when this host is being closed: somebody waits
            if not runner.verdict.done():
                runner.verdict.set_result(changed)

    async def close(self) -> None:
        """End the host and all its runners; returns when they are gone, and with them the memory that they shared."""
        if self._backoff is not None:
            self._backoff.cancel()
        runners = _watched(runner.pid for runner in self._children.values())
        while not self._ready.empty():
            self._ready.get_nowait().discard()
        await self._end_processes()
        await _all_gone(runners)
        self._end(f"The host of {self.spec.repo_id} was closed.")
        for task in list(self._tasks):
            task.cancel()
        self._control.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    async def _end_processes(self) -> None:
        """Kill the host itself, which ends its runners; what was started waits for it, when it is another process."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _END_S)
                return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    # --------------------------------------------------------------------------------------------------------- inside

    @property
    def _warming(self) -> int:
        return sum(1 for task in self._tasks if task.get_name() == "warming")

    async def _loaded(self, on_progress: Callable[[str], None]) -> None:
        # Shared weights come into another process's memory, or a GPU's: how far is not seen from outside.
        progress = LoadingProgress(0 if self.spec.sharing else self.spec.weights_bytes, on_progress)
        try:
            await self._loading(progress)
        finally:
            progress.close()

    async def _loading(self, progress: LoadingProgress) -> None:
        while True:
            message, pidfd = await self._message()
            if message is None:
                raise ModelLoadError(
                    f"The host of {self.spec.repo_id} died while loading (exit {await self._process.wait()}); "
                    "its log says more. Not enough memory is the usual reason."
                )
            if "host" in message:
                self._pidfd = pidfd
                progress.started(pid_of(pidfd))
            elif "progress" in message:
                progress.stage(str(message["progress"]))
            elif "error" in message:
                raise ModelLoadError(str(message["error"]))
            elif "facts" in message:
                facts = HostFacts(**message["facts"])
                if facts.sandbox != self._settings.sandbox or self._pidfd < 0:
                    raise ModelLoadError(
                        f"The host of {self.spec.repo_id} runs under the profile {facts.sandbox or 'none'}, not {self._settings.sandbox}."
                    )
                self.facts = replace(facts, pid=pid_of(self._pidfd))
                return

    async def _message(self) -> tuple[dict[str, Any] | None, int]:
        """Return the host's next message (None at its end) and the descriptor that came with it, or -1."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, 64 << 10, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await readable(self._control)
                continue
            return (json.loads(data) if data else None), (descriptors[0] if descriptors else -1)

    async def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                message, pidfd = await self._message()
                if message is None:
                    break
                if "forked" in message:
                    self._born(int(str(message["forked"])), pidfd)
                elif "refused" in message:
                    self._unborn.popleft().close()
                    self._not_made(str(message["refused"]))
                elif "checked" in message and self._checked is not None and not self._checked.done():
                    self._checked.set_result(str(message["changed"]))
                elif "digest" in message and self._digest is not None and not self._digest.done():
                    self._digest.set_result(message)
                elif "exited" in message:
                    runner = self._children.pop(message["exited"], None)
                    if runner is not None:
                        runner.has_exited(message["status"], message["cpu_ms"], message["peak"])
                        if runner.verdict is not None and runner.receipt is not None:
                            self._spawn(self._verdict(runner))
        self._end(f"The host process of {self.spec.repo_id} died.")

    def _fork(self) -> None:
        if self.closed.done() or self._backoff is not None:
            return
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            self._not_made(f"the agent cannot open a socket: {error.strerror}")
            return
        try:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
            ours.setblocking(False)
            socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
            self._unborn.append(ours)
        except OSError as error:
            ours.close()
            self._not_made(f"the host could not be asked: {error.strerror}")
        finally:
            theirs.close()

    def _not_made(self, why: str, *, died: bool = False) -> None:
        """The machine refused a runner, or one died at once: try again, ever more rarely. A loaded model is not given up for it."""
        self._refusals += 1
        log.warning("no runner", extra={"model": self.spec.repo_id, "text": why, "in_a_row": self._refusals})
        text = f"{self.spec.repo_id} gets no runner at present: {why}"
        if died and self._refusals >= _DEATHS:
            self._end(f"{text} ({self._refusals} times in a row).")
            return
        if self._refusals >= _PATIENCE:
            refused, self._refused = self._refused, asyncio.get_running_loop().create_future()
            refused.set_result(f"{text}.")
        if self._backoff is None:
            wait_s = min(_MOST_BACKOFF_S, _LEAST_BACKOFF_S * 2 ** (self._refusals - 1))
            self._backoff = asyncio.get_running_loop().call_later(wait_s, self._try_again)

    def _try_again(self) -> None:
        self._backoff = None
        self._fork()

    def _born(self, pid: int, pidfd: int) -> None:
        """`pid` is the host's own count; exits are reported by it."""
        sock = self._unborn.popleft()
        try:
            runner = self._runner(sock, pid_of(pidfd), pidfd)
        except (OSError, SandboxError) as error:  # it ends at the end of its socket
            sock.close()
            if pidfd >= 0:
                os.close(pidfd)
            self._not_made(f"the agent cannot watch a process: {error}", died=True)
            return
        self._children[pid] = runner
        self._spawn(self._await_ready(runner), name="warming")

    def _runner(self, sock: socket.socket, pid: int, pidfd: int) -> Runner:
        device, shared = self.facts.device, bool(self.facts.sharing)
        meter = DeviceMeter(pid, self._gpu_memory) if "cuda" in device else None
        return Runner(sock, pid, device, pidfd, checked=shared, device_meter=meter)

    async def _await_ready(self, runner: Runner) -> None:
        try:
            await asyncio.wait_for(runner.ready(), _READY_S)
            if problem := deviation(runner.pid, self._settings.sandbox):
                raise SandboxError(problem)
        except SandboxError as error:
            runner.discard()
            self._failures += 1
            if self._failures >= _SETUP_FAILURES:
                self._end(f"Runners of {self.spec.repo_id} cannot be set up: {error}")
                return
            self._fork()
        except (RunnerError, TimeoutError) as error:
            runner.discard()
            self._not_made(str(error).rstrip(".") or "it was not ready in time", died=True)
        else:
            self._ready.put_nowait(runner)
            recovered = self._refusals > 0
            self._failures = self._refusals = 0
            if recovered:
                self.replenish()

    def _end(self, why: str) -> None:
        if not self.closed.done():
            self.closed.set_result(why)
        for runner in self._children.values():
            runner.has_exited(None)
            if runner.verdict is not None and not runner.verdict.done():
                runner.verdict.set_result(HOST_GONE)
        self._children.clear()

    def _spawn(self, work: object, name: str = "host") -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _watched(pids: Iterable[int]) -> list[int]:
    """Return a descriptor of each process that is still there."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            found.append(os.pidfd_open(pid))
    return found


async def _all_gone(pidfds: list[int]) -> None:
    """Wait until these processes have ended; for `_END_S` at most. Closes the descriptors."""
    try:
        async with asyncio.timeout(_END_S):
            for pidfd in pidfds:
                await readable(pidfd)
    except TimeoutError:
        log.error("runners of a closed host are still there", extra={"runners": len(pidfds)})
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
