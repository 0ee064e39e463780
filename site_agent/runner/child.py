"""The runner: a forked, confined child of a model host that opens one payload, runs it, sends the result, and dies.

This is the one file of the mesh that opens pickle-shaped bytes of a job. Everything here runs as hostile code after
`_deserialize`: the boundary is `confine.py`, never this module.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import linecache
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from edif_mesh.errors import SiteError, UnsupportedValueError
from edif_mesh.results.archive import plan, plan_rest
from edif_mesh.results.archive_sent import Sent
from site_agent.runner.confine import SandboxSettings, confine
from site_agent.runner.devices import (
    device_memory_sentence,
    fault_note,
    limit_device_memory,
    ran_out_of_device_memory,
)
from site_agent.runner.early import EarlySender, FrameSender
from site_agent.runner.process import take_small_pages
from site_agent.runner.protocol import (
    HEAD,
    LOG_FRAME_COST_BYTES,
    MAX_JOB_HEAD_BYTES,
    JobHead,
    Kind,
    pack,
    pack_json,
)
from site_agent.runner.rebuilding import keep_to_one_model, payload_sentence
from site_agent.runner.saves import checked_saves, refusal

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SLACK_BYTES, _THREAD_SLACK_BYTES = 256 << 20, 80 << 20
"""Address space beyond the memory limit: libraries that a job is the first to import, and a stack and a heap for each thread."""
_PROMPT_FRAMES = 500
_BATCH_CHARACTERS = 16_384
_MAX_LOG_FRAME = 60_000
_MAX_TEXT = 100_000


def serve(
    sock: socket.socket,
    model: Any,
    warm_payload: bytes | None,
    settings: SandboxSettings,
    host: int,
    *,
    number: int = 0,
    address_space: int = 0,
    proc: int = -1,
    prepare: Callable[[], object] | None = None,
    borrowed: tuple[int, ...] = (),
    limited: bool = True,
) -> None:
    """Confine this process, a child of `host`; wait for one job on `sock`, warm up if that takes long, run it. Never returns.

    `number`, `prepare` and `borrowed` as for `confine`; `address_space` is the host's and `proc` a descriptor of its /proc, for a
    child that sees none. Without `limited` the address space is not: CUDA reserves all of a machine's.
    """
    status = 1
    try:
        address_space = address_space or (address_space_bytes() if limited else 0)
        _hand_over_meter(sock, proc)
        take_small_pages()
        gc.enable()
        confine(settings, sock.fileno(), number, prepare=prepare, borrowed=borrowed)
        if os.getppid() not in (host, 0):  # it died before the death signal was set; 0: it is outside our pid namespace
            os._exit(1)
        sock.sendall(pack(Kind.READY))
        _serve_one(sock, model, warm_payload, address_space if limited else -1)
        status = 0
    except SiteError as error:
        with contextlib.suppress(OSError):
            sock.sendall(pack_json(Kind.FAILED, {"code": "sandbox", "text": str(error)}))
    except BaseException:
        status = 2
    finally:
        os._exit(status)


def _hand_over_meter(sock: socket.socket, proc: int) -> None:
    """Give the supervisor the file in which the kernel counts our memory: once confined, we could not open it, nor may others."""
    with contextlib.suppress(FileNotFoundError):
        if proc >= 0:
            meter = os.open("self/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        else:
            meter = os.open("/proc/self/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC)
        socket.send_fds(sock, [pack(Kind.METER)], [meter])
        os.close(meter)


def _serve_one(sock: socket.socket, model: Any, warm_payload: bytes | None, address_space: int) -> None:
    objects = model._remoteable_persistent_objects()
    kind, length = HEAD.unpack(_receive(sock, HEAD.size))
    while kind == Kind.WARM:
        _warm_up(warm_payload, model)
        kind, length = HEAD.unpack(_receive(sock, HEAD.size))
    if kind != Kind.JOB or length > MAX_JOB_HEAD_BYTES:
        return
    head = JobHead(**json.loads(_receive(sock, length)))
    payload = _receive(sock, head.payload_bytes)
    _set_limits(head, address_space)
    frames = FrameSender(sock)
    output = LogWriter(frames, head.log_bytes)
    sys.stdout = sys.stderr = output
    frames.send(pack(Kind.STARTED))
    try:
        failure = _run(frames, model, head, bytes(payload), output, objects)
    except MemoryError:
        failure = "out_of_memory", _memory_sentence(head)
    if failure is not None:
        output.close()
        code, text = failure
        text = text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT // 2] + "\n[...]\n" + text[-_MAX_TEXT // 2 :]
        frames.send(pack_json(Kind.FAILED, {"code": code, "text": text}))
    else:
        frames.send(pack(Kind.DONE))
    sock.recv(1)  # until it is killed: the supervisor reads from the kernel first what was used


def _warm_up(payload: bytes | None, model: Any) -> None:
    if payload is not None:
        with contextlib.suppress(Exception), checked_saves():
            plan(execute(payload, model)).to_bytes()
        forget_warm_up()
        gc.collect()  # the job then gets memory that has been written to already
        gc.freeze()


def _run(
    frames: FrameSender, model: Any, head: JobHead, payload: bytes, output: LogWriter, objects: dict[str, Any]
) -> tuple[str, str] | None:
    """Run the job; returns None after the result was sent, else the failure's code and text."""
    import torch

    torch.set_num_threads(head.threads)
    limit_device_memory(head.memory_bytes)
    try:
        payload = _decompress(payload, head.max_payload_bytes) if head.compressed else payload
    except _TooLargeError as error:
        return "payload_too_large", str(error)
    except Exception as error:
        return "bad_payload", f"The payload is not one zstd frame: {error}"
    if head.env:
        try:
            model._remoteable_set_env(dict(head.env))
            objects = model._remoteable_persistent_objects()
        except BaseException as error:
            return "env", f"The request's environment {head.env} cannot be applied at this site: {error}"
    keep_to_one_model()
    try:
        # A payload holds an envoy for every module, thousands of objects that live as long as the job. Left to itself, the
        # collector looks at them again and again, for longer than all the rest takes.
        gc.disable()
        tracer = _deserialize(payload, objects)
        gc.freeze()
        gc.enable()
    except MemoryError:
        raise
    except BaseException as error:
        return "bad_payload", payload_sentence(error)
    sent = Sent()
    # A wire dtype is another tensor than the saved one: it is made when the block has ended.
    early = None if head.wire_dtype else EarlySender(frames, sent, head.result_bytes // 2)
    try:
        with checked_saves(early.saved if early is not None else None):
            values = _execute(tracer)
    except MemoryError:
        raise
    except UnsupportedValueError as error:
        return error.code, refusal(error)
    except BaseException as error:
        if _is_allocation_failure(error):
            return "out_of_memory", _memory_sentence(head, str(error))
        if ran_out_of_device_memory(error):
            return "out_of_memory", device_memory_sentence(head.memory_bytes, str(error))
        return "user_error", _user_traceback(error, tracer) + fault_note(error)
    finally:
        if early is not None:
            early.end()
    return _send_result(frames, sent, values, head, output)


def _send_result(
    frames: FrameSender, sent: Sent, values: dict[str, Any], head: JobHead, output: LogWriter
) -> tuple[str, str] | None:
    try:
        archive = plan_rest(values, sent, wire_dtype=head.wire_dtype)
    except MemoryError:
        raise
    except UnsupportedValueError as error:
        return error.code, str(error)
    except Exception as error:
        if ran_out_of_device_memory(error):
            return "out_of_memory", device_memory_sentence(head.memory_bytes, str(error))
        if note := fault_note(error):  # the GPU runs behind: its refusal shows when values are fetched from it
            return "user_error", f"{type(error).__name__}: {str(error).splitlines()[0]}{note}"
        return "unsupported_value", f"The saved values cannot be sent: {error}"
    if archive.total_bytes > head.result_bytes:
        return (
            "result_too_large",
            f"The saved values take {archive.total_bytes / 1e6:,.1f} MB; this job may return {head.result_bytes / 1e6:,.1f} MB. "
            "Save less (a slice, a mean, one layer), or order a higher result_bytes.",
        )
    output.close()  # a thread that still prints must not speak in the middle of the result
    frames.archive(iter(archive.parts))
    return None


# ----------------------------------------------------------------------------------------------------------- nnsight


def execute(payload: bytes, model: Any) -> dict[str, Any]:
    """Open an uncompressed payload against `model`, run it, and return the saved values by name."""
    return _execute(_deserialize(payload, model._remoteable_persistent_objects()))


def _deserialize(payload: bytes, objects: dict[str, Any]) -> Any:
    """Rebuild the tracer; `objects` are the model's parts by the ids that a payload names."""
    from nnsight.schema.request import RequestModel

    return RequestModel.deserialize(payload, objects, False)


def _execute(tracer: Any) -> dict[str, Any]:
    from nnsight.tracing.tracer import _saves, dec, inc

    inc()
    try:
        tracer.execute(tracer.info.code)
        saved = _saves()
        # By name: nnsight's own order follows the string hash of the client's process, and an archive should not.
        return {name: value for name, value in sorted(tracer.info.frame.f_locals.items()) if id(value) in saved}
    finally:
        dec()


def forget_warm_up() -> None:
    """Drop what a warm-up left in memory. nnsight memoizes sources and blocks per process: user code must not meet those of the warm-up."""
    from nnsight.tracing.globals import BLOCKS, SOURCES

    BLOCKS.clear()
    SOURCES.clear()
    linecache.clearcache()


def _user_traceback(error: BaseException, tracer: Any) -> str:
    """Format the error as nnsight shows it locally: the researcher's own files and lines, none of ours."""
    from nnsight.tracing.util import clean_traceback, filter_traceback

    try:
        find = getattr(tracer, "traceback", None)
        found = find(error) if find is not None else clean_traceback(error.__traceback__)
        found = filter_traceback(found, lambda frame: not frame.f_code.co_filename.startswith(_PACKAGE))
        error.__context__ = None
        return "".join(traceback.format_exception(type(error), error, found)).rstrip()
    except Exception:  # an exception that cannot even be shown
        return f"Your code raised {type(error).__name__}."


# ------------------------------------------------------------------------------------------------------------ limits


class _TooLargeError(Exception):
    pass


def _decompress(data: bytes, most: int) -> bytes:
    """Decompress one zstd frame, counting ourselves: a frame's declared size is the sender's word."""
    import zstandard

    result = io.BytesIO()
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(data))
    while piece := reader.read(1 << 20):
        if result.tell() + len(piece) > most:
            raise _TooLargeError(
                f"The payload is over {most / 1e6:,.1f} MB when decompressed, which is the limit here."
            )
        result.write(piece)
    return result.getvalue()


def _set_limits(head: JobHead, address_space: int) -> None:
    """Have the kernel refuse what goes far beyond the limits; `address_space` is what this process had when it was forked, or -1.

    It counts addresses, not memory: what was mapped for the weights is allowed for, however large. A job that unmaps
    weights could fill their addresses anew, and pages that it copies by writing to weights have addresses already: these
    the supervisor counts (`usage.Meter`).
    """
    most = address_space + head.memory_bytes + _SLACK_BYTES + head.threads * _THREAD_SLACK_BYTES
    if address_space >= 0:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
    used = int(time.process_time())
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (used + head.cpu_s, used + head.cpu_s + 5))


def address_space_bytes() -> int:
    """Return the size of this process's address space."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _is_allocation_failure(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _memory_sentence(head: JobHead, said: str = "") -> str:
    found = re.search(r"allocate (\d{1,20}) bytes", said)
    piece = f" The piece that was refused has {int(found[1]) / 1e9:,.2f} GB." if found else ""
    return (
        f"The job needed more memory than its limit of {head.memory_bytes / 1e9:,.2f} GB (beyond the model's weights).{piece} "
        "Keep or save less at once, or order a higher memory_bytes."
    )


# ------------------------------------------------------------------------------------------------------------ output


class LogWriter(io.TextIOBase):
    """What `print` writes to: whole lines as LOG frames, prompt at first, in batches when there are many, then cut."""

    def __init__(self, frames: FrameSender, limit_bytes: int) -> None:
        self._frames_out, self._left, self._limit = frames, limit_bytes, limit_bytes
        self._pending: list[str] = []
        self._size = 0
        self._frames = 0
        self._lock = threading.RLock()

    def writable(self) -> bool:
        """It can be written to."""
        return True

    def write(self, text: str) -> int:
        """Take text; send it when a line is complete."""
        with self._lock:
            if self._left > 0:
                self._pending.append(text)
                self._size += len(text)
                if self._size >= _BATCH_CHARACTERS or (self._frames < _PROMPT_FRAMES and "\n" in text):
                    self._send()
        return len(text)

    def flush(self) -> None:
        """Send what is pending, unless there was so much that it goes in batches."""
        with self._lock:
            if self._frames < _PROMPT_FRAMES:
                self._send()

    def close(self) -> None:
        """Send the rest; what is printed from now on is dropped. A broken socket is the supervisor's to notice."""
        with self._lock, contextlib.suppress(OSError):
            self._send()
            self._left = 0

    def _send(self) -> None:
        data = "".join(self._pending).encode("utf-8", "replace")
        self._pending, self._size = [], 0
        for start in range(0, len(data), _MAX_LOG_FRAME):
            piece = data[start : start + _MAX_LOG_FRAME]
            if self._left <= 0:
                return
            self._left -= len(piece) + LOG_FRAME_COST_BYTES
            if self._left <= 0:
                piece = piece[: max(0, self._left + len(piece))]
                piece += (
                    f"\n[the output limit of this job, {self._limit:,} bytes, is reached; the rest is not shown. "
                    "Print less, or order a higher log_bytes.]\n"
                ).encode()
            self._frames_out.send(pack(Kind.LOG, piece))
            self._frames += 1


def _receive(sock: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = sock.recv_into(view[got:])
        if count == 0:
            os._exit(0)
        got += count
    return data
