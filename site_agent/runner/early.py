"""Sends saved values while the job still runs. Lives in the confined runner only.

A thread looks at what `save()` was called on, and at saved lists and dictionaries again and again, and sends every dense
CPU tensor that it finds. Nothing is promised by it: the archive's tree, written when the block has ended, names a storage
that left early only if its bytes are still the same; else it is sent anew (`archive_sent.Sent`).
"""

from __future__ import annotations

import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from edif_mesh.results.archive import ALONE_BYTES, Cut
from edif_mesh.results.archive_encode_tensors import is_plain_tensor
from edif_mesh.results.archive_records import DATA, LEAF, MAX_LEAF_BYTES, leaf_text
from edif_mesh.results.archive_sent import Sent, address, fingerprint
from edif_mesh.results.archive_types import BARE, NAMES
from edif_mesh.results.archive_views import raw_bytes
from site_agent.runner.protocol import HEAD, Kind, pack

FIRST_AFTER_S, AGAIN_AFTER_S = 0.01, 0.02
"""A job that ends at once is left alone; then saved containers are looked at so often."""
_FRAME_BYTES = 4 << 20
_SENDS_OF_ONE = 2
_MOST_SAVES = 4096
_MOST_PARTS = 100_000


class FrameSender:
    """The runner's side of its socket, for more than one thread: a frame is never broken by another."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.lock = threading.RLock()

    def send(self, frame: bytes) -> None:
        """Send one whole frame."""
        with self.lock:
            self._sock.sendall(frame)

    def archive(self, parts: Iterator[bytes | memoryview | Cut]) -> None:
        """Send a piece of the archive, in frames between which others may come."""
        waiting: list[memoryview] = []
        size = 0
        for part in parts:
            if isinstance(part, Cut):
                self._data(waiting, size)
                waiting, size = [], 0
                self.send(pack(Kind.CUT, bytes([part.element if part.element < 256 else 0])))
                continue
            view = memoryview(part).cast("B")
            while len(view):
                piece = view[: _FRAME_BYTES - size]
                view, size = view[len(piece) :], size + len(piece)
                waiting.append(piece)
                if size == _FRAME_BYTES:
                    self._data(waiting, size)
                    waiting, size = [], 0
        self._data(waiting, size)

    def _data(self, pieces: list[memoryview], size: int) -> None:
        if size:
            small = HEAD.pack(Kind.DATA, size)
            with self.lock:
                for piece in pieces:
                    if len(small) + len(piece) <= 64 << 10:
                        small += bytes(piece)
                    else:
                        self._sock.sendall(small)
                        self._sock.sendall(piece)
                        small = b""
                self._sock.sendall(small)


class EarlySender:
    """Begins with the first value that is saved, ends with the block."""

    def __init__(self, frames: FrameSender, sent: Sent, most_bytes: int) -> None:
        """At most `most_bytes` of the archive leave early."""
        self._frames, self._sent, self._most = frames, sent, most_bytes
        self._saved: deque[tuple[str, Callable[[], Any]]] = deque(maxlen=_MOST_SAVES)
        self._times: dict[tuple[int, int], tuple[int, bytes]] = {}
        self._thread: threading.Thread | None = None
        self._news, self._ended = threading.Event(), threading.Event()

    def saved(self, value: Any, name: str) -> None:
        """Look at this value from now on; a tensor only for as long as the job keeps it."""
        try:
            self._saved.append((name, weakref.ref(value)))
        except TypeError:  # lists and dictionaries
            self._saved.append((name, lambda: value))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="early values", daemon=True)
            self._thread.start()
        self._news.set()

    def end(self) -> None:
        """Return once nothing more leaves by itself."""
        self._ended.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        wait_s = FIRST_AFTER_S
        try:
            while not self._ended.wait(wait_s):
                if not any(type(find()) in (list, dict, tuple) for _, find in list(self._saved)):
                    self._news.wait()
                self._news.clear()
                self._look()
                wait_s = AGAIN_AFTER_S
        except Exception:  # whatever cannot leave now, leaves at the end, where it is said why it cannot
            pass

    def _look(self) -> None:
        left = _MOST_PARTS
        for name, find in list(self._saved):
            for path, tensor in _tensors(find(), name, 3):
                left -= 1
                if left < 0 or self._ended.is_set():
                    return
                self._consider(path, tensor)

    def _consider(self, name: str, tensor: Any) -> None:
        data = _bytes_of(tensor)
        if data is None or self._sent.position + len(data) > self._most:
            return
        where = address(data)
        times, last = self._times.get(where, (0, b""))
        if times >= _SENDS_OF_ONE:
            return
        mark = fingerprint(data)
        if mark == last:
            return
        self._times[where] = times + 1, mark
        parts: list[bytes | memoryview | Cut] = [*self._sent.begin()]
        if len(data) >= ALONE_BYTES:
            parts.append(Cut(tensor.element_size()))
        offset, record = self._sent.record(DATA, [data])
        parts += record
        if len(data) >= ALONE_BYTES:
            parts.append(Cut())
        node = {
            "t": "tensor",
            "d": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "o": 0,
            "s": 0,
        }
        text = leaf_text(name, node, [(offset, len(data))])
        if len(text) <= MAX_LEAF_BYTES:
            parts += self._sent.record(LEAF, [text])[1]
        self._frames.archive(iter([*parts, Cut()]))
        self._sent.add(data, offset, mark)


def _tensors(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """The tensors in a saved value, with how the researcher would write them."""
    if is_plain_tensor(value):
        yield name, value
    elif depth and type(value) in (list, tuple):
        for number, part in enumerate(list(value)):
            yield from _tensors(part, f"{name}[{number}]", depth - 1)
    elif depth and type(value) is dict:
        for key, part in list(value.items()):
            yield from _tensors(part, f"{name}[{key!r}]", depth - 1)


def _bytes_of(tensor: Any) -> memoryview | None:
    """The tensor's own bytes where an archive would ship exactly these: dense, on the CPU; else None."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel() or tensor.dtype in BARE:
        return None
    if tensor.is_conj() or tensor.is_neg() or tensor.dtype is torch.bool:
        return None
    start = tensor.storage_offset() * tensor.element_size()
    return raw_bytes(tensor, start, start + tensor.numel() * tensor.element_size())
