"""The host: one process a loaded model. Loads the weights, warms up, forks confined children ahead; reads no job byte.

Started by the agent through `launch`, with a SOCK_SEQPACKET control socket. It stays single-threaded until a fork, holds no
secret, and dies with the agent.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from edif_mesh.errors import ModelLoadError, SandboxError
from site_agent.hosting.digest import weights_digest
from site_agent.hosting.pages import collapse
from site_agent.hosting.spec import LOADING_WEIGHTS, HostFacts, ModelSpec
from site_agent.runner.child import address_space_bytes, execute, forget_warm_up, serve
from site_agent.runner.confine import settings_for
from site_agent.runner.namespaces import Enclosure
from site_agent.runner.process import die_with_parent, harden_parent

MAX_CONTROL_BYTES = 64 << 10
Start = Callable[[socket.socket, int, int], None]
"""Makes a forked child a runner: its socket, the host's process id, and the child's number. Never returns."""
FORK, DIGEST, CHECK = b"fork", b"digest", b"check"
"""What the agent asks on the control socket: a runner (with the descriptor of its socket), the weights' digest, and, where they
lie in shared memory, whether they are what they were."""


def main(control: socket.socket, enclosure: Enclosure) -> None:
    """Load, then serve forks until the control socket closes."""
    order = json.loads(control.recv(MAX_CONTROL_BYTES))
    spec = ModelSpec(**order["spec"])
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # runners open their own memory's count by it
    try:
        settings = settings_for(tuple(order["readable"]), namespaces=enclosure.active)
        model, facts = load(spec, control)
        payload = _warm_up(model)
    except Exception as error:
        say(control, {"error": sentence(spec, error)})
        return
    settle()
    collapse()
    size = address_space_bytes()
    try:
        enclosure.close_off(settings.readable)
    except SandboxError as error:
        say(control, {"error": str(error)})
        return
    say(control, {"facts": asdict(replace(facts, sandbox=enclosure.profile))})

    def start(sock: socket.socket, host: int, number: int) -> None:
        serve(sock, model, payload, settings, host, number=number, address_space=size, proc=proc)

    serve_forks(control, enclosure, start, model)


def settle() -> None:
    """Before the first fork: be unreadable for others, hold nothing of the warm-up, and leave pages that children share alone."""
    harden_parent()
    forget_warm_up()
    gc.collect()
    gc.freeze()
    gc.disable()


def load(spec: ModelSpec, control: socket.socket | None, device: str = "") -> tuple[Any, HostFacts]:
    """Load the model of `spec` through nnsight, where it says or, for its structure alone, on `device`; progress goes to `control`."""
    say(control, {"progress": "importing torch and nnsight"})
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its monitor is a thread, and a host has only one
    import nnsight
    from nnsight.modeling.transformers import TransformersModel

    say(control, {"progress": LOADING_WEIGHTS})
    began = time.monotonic()
    options: dict[str, Any] = {"task": spec.task, "dispatch": True}
    if spec.path is None and spec.revision is not None:
        options["revision"] = spec.revision
    if spec.dtype != "auto":
        options["compute_dtype" if spec.quantization else "dtype"] = getattr(torch, spec.dtype)
    if spec.quantization:
        options["dtype"] = spec.quantization  # nnsight takes the format's name there
    if spec.attn_implementation:
        options["attn_implementation"] = spec.attn_implementation
    options |= _placement(spec, device)
    model = TransformersModel(spec.path or spec.repo_id, **options)
    model._module.eval()
    parameters = list(model._module.parameters())
    facts = HostFacts(
        repo_id=spec.repo_id,
        revision=spec.resolved_revision,
        task=spec.task,
        dtype=str(parameters[0].dtype).removeprefix("torch.") if parameters else "float32",
        weights_bytes=sum(t.numel() * t.element_size() for t in (*parameters, *model._module.buffers())),
        load_ms=int((time.monotonic() - began) * 1000),
        attn_implementation=str(getattr(model._module.config, "_attn_implementation", "") or ""),
        nnsight=nnsight.__version__ if hasattr(nnsight, "__version__") else version("nnsight"),
        pid=os.getpid(),
        device=",".join(sorted({str(p.device) for p in parameters})) or "cpu",
    )
    say(control, {"progress": "warming up"})
    return model, facts


def _placement(spec: ModelSpec, device: str) -> dict[str, Any]:
    if device:  # both: one is for the weights, the other keeps the pipeline from moving them to a GPU that it sees
        return {"device": device, "device_map": device}
    if spec.device == "cpu" and spec.device_map is None:
        return {"device": "cpu"}
    return {"device_map": spec.device_map if spec.device_map is not None else {"": spec.device}}


class _Capture:
    """An nnsight backend that keeps the serialized trace instead of running it."""

    payload: bytes = b""

    def __call__(self, tracer: Any) -> None:
        from nnsight.schema.request import RequestModel

        self.payload = RequestModel.serialize(tracer, False)


_WARM_UP_PROMPT = "Before it is lent, a runner reads one short sentence."
"""About as long as what a job sends, so that a job's first forward finds its pages written already."""


def _warm_up(model: Any) -> bytes | None:
    """Run a small trace of our own through the whole path; returns it, or None for models that take no token ids."""
    payload = capture_warm_up(model)
    try:
        if payload is not None:
            execute(payload, model)
    except Exception as error:
        print(f"warm-up skipped: {error!r}", file=sys.stderr, flush=True)
        return None
    return payload


def capture_warm_up(model: Any) -> bytes | None:
    """Return a small trace of our own, not run; None for models that no such trace can be made for.

    It reads, swaps, and asks for a gradient: of a number of its own, since those of the weights would take as much memory.
    """
    import torch

    capture = _Capture()
    prompt = _WARM_UP_PROMPT if model.tokenizer is not None else torch.tensor([list(range(1, 13))])
    try:
        with model.trace(prompt, backend=capture):
            number = torch.ones(1, requires_grad=True)
            with (number * 2).sum().backward():
                slope = number.grad.save()  # noqa: F841
            warm = model.output.save()
            model.output = warm
            print("", end="")
    except Exception as error:
        print(f"warm-up skipped: {error!r}", file=sys.stderr, flush=True)
        return None
    return capture.payload


def serve_forks(
    control: socket.socket, enclosure: Enclosure, start: Start, model: Any = None, *, link: socket.socket | None = None
) -> None:
    """Fork runners and answer questions until the agent is gone, or, where there is one, the weights owner behind `link`."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(reader, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watched: list[Any] = [control, reader, *([link] if link is not None else [])]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 4096)
            _reap(control)
        if link is not None and link in ready:
            answer = link.recv(MAX_CONTROL_BYTES)
            if not answer:
                return
            say(control, json.loads(answer))
        if control in ready:
            data, descriptors, _, _ = socket.recv_fds(control, 64, 1)
            if not data:
                return
            if data in (DIGEST, CHECK) and link is not None:
                link.sendall(data)
            elif data == DIGEST:
                _digest(control, model)
            elif descriptors:
                _fork(control, enclosure, descriptors[0], start)
            else:  # the kernel drops what a process at its limit of descriptors cannot take
                say(control, {"refused": "its host has no free descriptor"})


def _fork(control: socket.socket, enclosure: Enclosure, descriptor: int, start: Start) -> None:
    host = os.getpid()
    try:
        pid, number = enclosure.fork()
    except (OSError, SandboxError) as error:
        os.close(descriptor)
        why = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        say(control, {"refused": f"the kernel refused a process: {why}"})
        return
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        start(socket.socket(fileno=descriptor), host, number)
    os.close(descriptor)
    pidfd = os.pidfd_open(pid)  # the agent counts processes otherwise than a host in a pid namespace
    say(control, {"forked": pid}, pidfd)
    os.close(pidfd)


def _digest(control: socket.socket, model: Any) -> None:
    """Answer with the weights' digest, computed by a child of its own: nothing of the host's memory is touched for it."""
    try:
        pid = os.fork()
    except OSError as error:
        say(control, {"digest": "", "why": f"the kernel refused a process: {error.strerror}"})
        return
    if pid == 0:
        try:
            signal.set_wakeup_fd(-1)
            die_with_parent()
            say(control, {"digest": weights_digest(model)})
        except BaseException as error:
            say(control, {"digest": "", "why": f"{type(error).__name__}: {error}"[:500]})
        finally:
            os._exit(0)


def _reap(control: socket.socket) -> None:
    while True:
        try:
            pid, status, used = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        cpu_ms = int((used.ru_utime + used.ru_stime) * 1000)
        peak = used.ru_maxrss << 10
        say(control, {"exited": pid, "status": os.waitstatus_to_exitcode(status), "cpu_ms": cpu_ms, "peak": peak})


def say(control: socket.socket | None, message: dict[str, Any], *descriptors: int) -> None:
    """Send one message to whoever started this process; end with them. None: nobody listens."""
    if control is None:
        return
    try:
        socket.send_fds(control, [json.dumps(message).encode()], descriptors)
    except OSError:
        os._exit(0)


def sentence(spec: ModelSpec, error: Exception) -> str:
    """Return why the model of `spec` could not be loaded, in one sentence."""
    if isinstance(error, SandboxError):
        return str(error)
    text = str(error).strip().split("\n")[0][:500]
    if isinstance(error, ModelLoadError):
        return f"The model {spec.repo_id} could not be loaded: {text}"
    return f"The model {spec.repo_id} could not be loaded: {type(error).__name__}: {text}"
