"""`edif up` and `edif down`: a whole mesh on one machine."""

from __future__ import annotations

import asyncio
import contextlib
import json as json_module
import signal
import subprocess
import sys
import time
from pathlib import Path

from edif_mesh.cli.exit_codes import FAILED, OK
from edif_mesh.cli.render import as_json, complain, say
from edif_mesh.config import home as default_home
from edif_mesh.errors import ConfigError, EdifError, NotFoundError, error_of
from edif_mesh.local.federation import LocalFederation, LocalSettings, prepare
from edif_mesh.local.supervisor import Supervisor, last_words, lock_home, running_mesh, stop_running
from edif_mesh.models import DEMO_MODEL, ResolvedModel, resolve_model


def run_up(
    *,
    sites: int,
    models: tuple[str, ...],
    port: int,
    monitor_port: int,
    slots: int,
    sandbox: str = "auto",
    state: Path | None,
    detach: bool,
    json: bool,
) -> int:
    """Start, say so in one line, keep it alive until asked to stop."""
    if sandbox not in (
        "auto",
        "base",
        "namespaced",
    ):  # `strict` needs the command of a runtime, in a site's own settings
        raise ConfigError(f"There is no sandbox {sandbox!r} for `edif up`: say base, namespaced or auto.")
    home = (state or default_home()).expanduser().absolute()
    settings = LocalSettings(home, sites, _resolve(models), port, monitor_port, slots, sandbox=sandbox)
    if detach:
        return _detach(settings, models, json)
    with lock_home(home):  # before anything is written there: another mesh may run on it
        (home / "mesh.json").unlink(missing_ok=True)
        return asyncio.run(_serve(prepare(settings), json))


def run_down(*, state: Path | None, json: bool) -> int:
    """Stop the running mesh and wait until nothing of it is left."""
    home = (state or default_home()).expanduser().absolute()
    stop_running(home)
    as_json({"stopped": True}) if json else say(f"The mesh on {home} has stopped.")
    return OK


def _resolve(models: tuple[str, ...]) -> tuple[ResolvedModel, ...]:
    result = []
    for name in models or (DEMO_MODEL,):
        folder = Path(name).expanduser()
        if folder.is_dir():
            result.append(resolve_model(folder.name, path=folder.absolute()))
            continue
        if name.startswith((".", "/", "~")):
            raise NotFoundError(
                f"There is no folder {name}. Give a hub id such as {DEMO_MODEL}, or a folder with config.json."
            )
        repo_id, _, revision = name.partition("@")
        result.append(resolve_model(repo_id, revision or None))
    return tuple(result)


async def _serve(federation: LocalFederation, json: bool) -> int:
    supervisor = Supervisor(federation, complain if json else say)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        starting = asyncio.ensure_future(supervisor.start())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return OK
        starting.result()
        _announce(running_mesh(federation.home), json)
        failing = asyncio.ensure_future(supervisor.wait())
        await asyncio.wait({failing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            complain(failing.result())
            return FAILED
        return OK
    finally:
        await supervisor.stop()


def _announce(mesh: dict[str, object], json: bool) -> None:
    if json:
        print(json_module.dumps(mesh), flush=True)
        return
    sites = ", ".join(str(name) for name in mesh["sites"])  # type: ignore[attr-defined]
    say(
        f"Ready: sites {sites}. Type in another terminal:  NDIF_HOST={mesh['gateway']} python your_script.py"
        f"   (watch: {mesh['monitor']}, stop: Ctrl-C or edif down)"
    )
    sys.stdout.flush()


def _detach(settings: LocalSettings, models: tuple[str, ...], json: bool) -> int:
    """Start ourselves again in a session of our own and wait until that one is ready."""
    home = settings.home
    lock_home(home).close()
    (home / "logs").mkdir(parents=True, exist_ok=True, mode=0o700)
    log = home / "logs" / "up.log"
    command = [sys.executable, "-m", "edif_mesh.cli", "up", "--json", "--state", str(home)]
    command += ["--sites", str(settings.sites), "--slots", str(settings.slots)]
    command += ["--sandbox", settings.sandbox]
    command += ["--port", str(settings.gateway_port), "--monitor-port", str(settings.monitor_port)]
    command += [part for name in models for part in ("--model", name)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    try:
        while process.poll() is None:
            with contextlib.suppress(EdifError):
                mesh = running_mesh(home)
                if mesh.get("ready") and mesh.get("supervisor") == process.pid:
                    _announce(mesh, json)
                    return OK
            time.sleep(0.05)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    raise _why_not(log)


def _why_not(log: Path) -> EdifError:
    """Return the error that the detached process wrote as its last document, or its last words."""
    output = log.read_text(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        document, _ = json_module.JSONDecoder().raw_decode(output, output.rindex('{\n  "error"'))
        return error_of(document["error"]["code"], document["error"]["text"])
    return ConfigError(f"The mesh could not be started. {last_words(log)}")
