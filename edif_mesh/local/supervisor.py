"""The supervisor of a local mesh: broker, coordinator, sites and gateway as child processes that it keeps alive.

A child that dies is started again with back-off, and it is said. When the supervisor ends, so do they: asked first,
killed after a while; and by the kernel (parent-death signal) when the supervisor itself is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from edif_mesh.client.mesh import Mesh
from edif_mesh.domain.site import ModelState
from edif_mesh.errors import ConfigError, EdifError, NoReplyError, NotFoundError
from edif_mesh.local.federation import LocalFederation
from edif_mesh.transport.embedded import EmbeddedServer, EmbeddedSettings, check_port, die_with_parent

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 16.0
_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
_STEADY_S = 60.0

Say = Callable[[str], None]


@dataclass
class Child:
    """One process under the supervisor."""

    name: str
    arguments: tuple[str, ...]
    log: Path
    process: asyncio.subprocess.Process | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    restarts: int = 0
    started_at: float = 0.0


class Supervisor:
    """Runs one prepared federation: `start`, then `wait`, then `stop`."""

    def __init__(self, federation: LocalFederation, say: Say) -> None:
        self.federation, self._say = federation, say
        passwords = federation.passwords
        self._broker = EmbeddedServer(
            EmbeddedSettings(
                store_dir=federation.home / "nats",
                port=federation.broker_port,
                users=tuple((role, passwords[role]) for role in ("coordinator", "site", "client")),
                system_user=("system", passwords["system"]),
                log_file=federation.log("nats"),
            )
        )
        python = sys.executable
        self.children = [
            Child(
                "coordinator",
                (python, "-m", "coordinator", "run", "--config", str(federation.coordinator_toml)),
                federation.log("coordinator"),
            ),
            *(
                Child(
                    f"site-{site}",
                    (python, "-m", "site_agent", "run", "--config", str(federation.site_toml(site))),
                    federation.log(f"site-{site}"),
                )
                for site in federation.sites
            ),
            Child(
                "gateway",
                (python, "-m", "edif_mesh.gateway", "--config", str(federation.client_toml)),
                federation.log("gateway"),
            ),
        ]
        self._stopping = self._ready = False
        self._keepers: list[asyncio.Task[None]] = []
        self._failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._began_ms = int(time.time() * 1000)

    async def start(self) -> None:
        """Start everything and wait until all is ready. Raises ConfigError and others, a sentence each.

        The caller holds the state folder's lock (`lock_home`).
        """
        settings = self.federation.settings
        check_port("127.0.0.1", settings.gateway_port)
        check_port("127.0.0.1", settings.monitor_port)
        await self._broker.start()
        self._spawn(self._keep_broker())
        for child in self.children:
            self._spawn(self._keep(child))
            if child.name == "coordinator":
                await self._until_ready(child)
        for child in self.children:
            await self._until_ready(child)
        await self._until_loaded()
        self._ready = True
        self._write_mesh()

    async def wait(self) -> str:
        """Wait for ever, or until something cannot be kept alive; returns why."""
        return await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """End every child: gateway and sites, whose last words the coordinator still hears, then it, the broker last."""
        self._stopping = True
        (self.federation.home / "mesh.json").unlink(missing_ok=True)
        await asyncio.gather(*(self._end(child) for child in self.children if child.name != "coordinator"))
        await asyncio.gather(*(self._end(child) for child in self.children))
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(self._end(child) for child in self.children))  # one was being started again just now
        await self._broker.stop()
        (self.federation.home / "mesh.json").unlink(missing_ok=True)

    async def _until_ready(self, child: Child) -> None:
        waiting = asyncio.ensure_future(child.ready.wait())
        futures: set[asyncio.Future[object]] = {waiting, self._failed}  # type: ignore[arg-type]
        done, _ = await asyncio.wait(futures, timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._failed in done:
            raise ConfigError(self._failed.result())
        if not done:
            raise ConfigError(f"{child.name} was not ready within {READY_TIMEOUT_S:.0f} s. {last_words(child.log)}")

    async def _until_loaded(self) -> None:
        """Wait until no site is loading a model any more; say which could not be loaded."""
        ours = set(self.federation.sites)
        async with await Mesh.connect(self.federation.client_toml, name="up") as mesh:
            while True:
                with contextlib.suppress(NoReplyError):
                    # Sites of an earlier start may be on record still: only what ours have said since counts.
                    view = await mesh.view()
                    sites = [s for s in view.sites if s.site in ours and s.seen_at_ms >= self._began_ms]
                    offers = [(site.site, offer) for site in sites for offer in site.models]
                    if len(sites) == len(ours) and not any(offer.state is ModelState.LOADING for _, offer in offers):
                        break
                await asyncio.wait({self._failed}, timeout=0.2)
                if self._failed.done():
                    raise ConfigError(self._failed.result())
        for site, offer in offers:
            if offer.state is ModelState.FAILED:
                self._say(f"{site} could not load {offer.repo_id}: {offer.detail}")

    async def _keep(self, child: Child) -> None:
        while not self._ending():
            code = await self._run_once(child)
            if self._ending():
                return
            if not child.ready.is_set() and child.restarts >= 2:
                self._fail(f"{child.name} cannot be started (exit {code}). {last_words(child.log)}")
                return
            if time.monotonic() - child.started_at > _STEADY_S:
                child.restarts = 0
            delay = _BACKOFF_S[min(child.restarts, len(_BACKOFF_S) - 1)]
            child.restarts += 1
            self._say(f"{child.name} ended ({_how(code)}); starting it again in {delay:g} s")
            await asyncio.sleep(delay)

    async def _run_once(self, child: Child) -> int:
        child.started_at = time.monotonic()
        with open(child.log, "ab") as log:
            child.process = await asyncio.create_subprocess_exec(
                *child.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        if self._ending():
            child.process.terminate()
            return await child.process.wait()
        self._write_mesh()
        assert child.process.stdout is not None
        while line := await _line_of(child.process.stdout):
            if line.startswith(b'{"ready": true'):
                if child.ready.is_set():
                    self._say(f"{child.name} is back")
                child.ready.set()
        return await child.process.wait()

    async def _keep_broker(self) -> None:
        """Start the broker again at once when it has run for a while, else with back-off."""
        tries, began = 0, time.monotonic()
        while not self._ending():
            process = self._broker.process
            if process is not None and process.returncode is None:
                code = await process.wait()
                if self._ending():
                    return
                self._say(f"nats-server ended ({_how(code)}); starting it again")
                tries = 0 if time.monotonic() - began > _STEADY_S else tries
            if tries:
                await asyncio.sleep(_BACKOFF_S[min(tries, len(_BACKOFF_S)) - 1])
            tries, began = tries + 1, time.monotonic()
            try:
                await self._broker.start()
                self._write_mesh()
                self._say("nats-server is back")
            except EdifError as error:
                self._say(f"nats-server could not be started: {error}")

    async def _end(self, child: Child) -> None:
        process = child.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _ending(self) -> bool:
        return self._stopping

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a keeper; should it ever fail itself, the mesh ends and says so, instead of going on unwatched."""
        keeper = asyncio.create_task(work)
        self._keepers.append(keeper)

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fail(f"The supervisor itself failed: {error!r}")

        keeper.add_done_callback(ended)

    def _fail(self, why: str) -> None:
        if not self._failed.done():
            self._failed.set_result(why)

    def _write_mesh(self) -> None:
        settings = self.federation.settings
        processes = {c.name: c.process.pid for c in self.children if c.process is not None}
        if self._broker.process is not None:
            processes["nats"] = self._broker.process.pid
        value = {
            "ready": self._ready,
            "supervisor": os.getpid(),
            "supervisor_birth": _birth(os.getpid()),
            "gateway": f"http://127.0.0.1:{settings.gateway_port}",
            "monitor": f"http://127.0.0.1:{settings.monitor_port}",
            "broker": self._broker.url,
            "sites": list(self.federation.sites),
            "processes": processes,
        }
        path = self.federation.home / "mesh.json"
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(value, indent=1))
        temporary.replace(path)


def lock_home(home: Path) -> IO[str]:
    """Take the state folder until the file is closed; raises ConfigError when another supervisor has it."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = open(home / "lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"The state folder {home} cannot be written: {error.strerror or error}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"A mesh runs on {home} already. Use it, stop it with `edif down`, or choose another folder with --state."
        ) from error
    return file


def running_mesh(home: Path) -> dict[str, object]:
    """Return what `mesh.json` says of the mesh that runs on `home`; raises NotFoundError when none runs."""
    try:
        value: dict[str, object] = json.loads((home / "mesh.json").read_text())
        alive = _birth(int(str(value["supervisor"]))) == value["supervisor_birth"]
    except (OSError, ValueError, KeyError, TypeError):
        alive = False
    if not alive:
        raise NotFoundError(f"No local mesh runs on {home}. Type: edif up")
    return value


def stop_running(home: Path, timeout_s: float = 40.0) -> None:
    """Ask the supervisor on `home` to end and wait until it has; raises NotFoundError, ConfigError."""
    mesh = running_mesh(home)
    pid = int(str(mesh["supervisor"]))
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise ConfigError(f"The mesh on {home} (process {pid}) belongs to another user.") from error
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if _birth(pid) != mesh["supervisor_birth"]:
            return
        time.sleep(0.05)
    raise ConfigError(f"The mesh on {home} (process {pid}) did not end within {timeout_s:.0f} s.")


def last_words(log: Path) -> str:
    """Return the last line of a log, as a hint."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return f"Its last words: {lines[-1][-400:]} (all of it: {log})" if lines else f"Its log is empty: {log}"


def _birth(pid: int) -> str:
    """Return when a process started (clock ticks after boot, which tells it from a later one of the same id); "" if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


async def _line_of(stream: asyncio.StreamReader) -> bytes:
    """Return the next line; one that is too long to be ours is dropped."""
    while True:
        try:
            return await stream.readline()
        except ValueError:
            continue


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
