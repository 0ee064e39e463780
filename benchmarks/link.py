"""A link with a round trip time, a bandwidth, and ways to break it: a TCP proxy in a process of its own.

    with Link("127.0.0.1:4222", rtt_ms=60, mbit=1000) as link:   # connect to link.address
        ...
        link.cut()      # every connection is gone; new ones are taken
        link.carried()  # bytes from the server's side and to it, of all connections so far

Also used by the fault tests. Bytes wait in the proxy for half the round trip and for their turn at the bandwidth, which all
connections share in each direction; what waits is bounded, then the sender waits as it would for a real link.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

_PIECE = 1 << 20
_LEAST_QUEUE = 4 << 20


class Link:
    """The near end: starts the proxy and commands it."""

    def __init__(self, to: str, *, rtt_ms: float = 0, mbit: float = 0) -> None:
        """`mbit` a second in each direction; 0: as fast as this machine copies."""
        self._command = [sys.executable, "-m", "benchmarks.link", to, str(rtt_ms), str(mbit)]
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self.address = ""

    def __enter__(self) -> Link:
        # No `multiprocessing`: it leaves a process of its own behind, for as long as whoever uses it lives.
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def cut(self) -> None:
        """Break every connection; what was under way in them is lost."""
        self._ask("cut")

    def carried(self) -> tuple[int, int]:
        """Return bytes that were handed on towards the connecting side, and towards the server."""
        down, up = self._ask("carried")
        return down, up

    def _ask(self, what: str) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
            return [int(number) for number in self._process.stdout.readline().split()]


class _Way:
    """One direction of the link."""

    def __init__(self, delay_s: float, bytes_per_s: float) -> None:
        self.delay_s, self.rate = delay_s, bytes_per_s
        self.carried = 0
        self.queue_bytes = max(_LEAST_QUEUE, int(2 * bytes_per_s * delay_s)) if bytes_per_s else 256 << 20
        self._free_at = 0.0
        self._lock = threading.Lock()

    @property
    def straight(self) -> bool:
        """Whether bytes need not wait."""
        return not self.delay_s and not self.rate

    def due(self, size: int) -> float:
        """Return when bytes that have come now are at the other end."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + (size / self.rate if self.rate else 0.0)
            return self._free_at + self.delay_s


def _proxy(to: tuple[str, int], delay_s: float, bytes_per_s: float) -> None:
    down, up = _Way(delay_s, bytes_per_s), _Way(delay_s, bytes_per_s)
    there: set[tuple[socket.socket, socket.socket]] = set()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                near, _ = server.accept()
                try:
                    far = socket.create_connection(to)
                except OSError:
                    near.close()
                    continue
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                there.add((near, far))
                for source, sink, way in ((near, far, up), (far, near, down)):
                    threading.Thread(target=_carry, args=(source, sink, way), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        print(server.getsockname()[1], flush=True)
        for line in sys.stdin:
            if line.strip() == "cut":
                for near, far in list(there):
                    # The near end gets no reset: a link that breaks takes nothing back that has arrived.
                    for sock, how in ((near, socket.SHUT_WR), (far, socket.SHUT_RDWR)):
                        with contextlib.suppress(OSError):
                            sock.shutdown(how)
                there.clear()
            print(down.carried, up.carried, flush=True)


def _carry(source: socket.socket, sink: socket.socket, way: _Way) -> None:
    with contextlib.suppress(OSError):
        if way.straight:
            buffer = memoryview(bytearray(_PIECE))
            while count := source.recv_into(buffer):
                sink.sendall(buffer[:count])
                way.carried += count
        else:
            _carry_slowly(source, sink, way)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
    with contextlib.suppress(OSError):  # what still comes is read and dropped, until the other side has closed
        while source.recv(_PIECE):
            pass


def _carry_slowly(source: socket.socket, sink: socket.socket, way: _Way) -> None:
    waiting: deque[tuple[float, bytes]] = deque()
    changed = threading.Condition()
    held = 0
    ended = False

    def deliver() -> None:
        nonlocal held
        while True:
            with changed:
                changed.wait_for(lambda: waiting or ended)
                if not waiting:
                    return
                due, data = waiting.popleft()
            wait_s = due - time.monotonic()
            if wait_s > 0:
                time.sleep(wait_s)
            try:
                sink.sendall(data)
                way.carried += len(data)
            except OSError:  # it was cut: what waits is lost
                pass
            with changed:
                held -= len(data)
                changed.notify_all()

    delivering = threading.Thread(target=deliver, daemon=True)
    delivering.start()
    # A piece stands for a packet: at a low rate it must be small, or everything behind it waits for it.
    piece = min(_PIECE, max(16 << 10, int(way.rate / 200))) if way.rate else _PIECE
    try:
        while data := source.recv(piece):
            with changed:
                while held >= way.queue_bytes:
                    changed.wait()
                waiting.append((way.due(len(data)), data))
                held += len(data)
                changed.notify_all()
    finally:
        with changed:
            ended = True
            changed.notify_all()
        delivering.join()


if __name__ == "__main__":
    _host, _, _port = sys.argv[1].rpartition(":")
    _proxy((_host, int(_port)), float(sys.argv[2]) / 2000, float(sys.argv[3]) * 125_000)
