"""`edif-site`: the daemon of one site. The only place that chooses its adapters."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from edif_mesh.config import SiteConfig, load_config, read_password
from edif_mesh.errors import ConfigError, EdifError, NotConnectedError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import TrustStore
from edif_mesh.transport.bulk import NatsBulk
from edif_mesh.transport.nats_bus import Connection, connect
from edif_mesh.wire.messages import Role
from site_agent.direct.keeper import direct_keeper
from site_agent.journal import Journal
from site_agent.runner.confine import harden_parent
from site_agent.shell.agent import SiteAgent
from site_agent.shell.budget import offered
from site_agent.shell.bulk import Cargo
from site_agent.shell.check import checks

DRAIN_S = 10.0
_CLOSE_S = 5.0
_CONNECT_AGAIN_S = 1.0
log = logging.getLogger("edif.site")
app = typer.Typer(add_completion=False, no_args_is_help=True, help="The agent of one site of the mesh.")
ConfigOption = Annotated[Path, typer.Option("--config", help="The site's settings file (TOML).")]


@app.command()
def run(config: ConfigOption) -> None:
    """Join the mesh with this machine's models until stopped (SIGTERM drains: running attempts are handed back)."""
    raise typer.Exit(_guarded(config, _run))


@app.command()
def check(config: ConfigOption) -> None:
    """Say what this site would offer and what is missing, one line each, without starting anything."""
    raise typer.Exit(_guarded(config, _check))


def main() -> None:
    """Entry point of the console script."""
    app()


def _guarded(path: Path, command: object) -> int:
    """Run `command` with the settings at `path`; an error of ours is one sentence and exit status 1."""
    try:
        config = load_config(SiteConfig, path)
        logging.basicConfig(
            level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
        )
        return _loop_runner()(command(config))  # type: ignore[operator, no-any-return]
    except EdifError as error:
        typer.echo(str(error), err=True)
        return 1


def _loop_runner() -> object:
    """Return uvloop's runner where it is installed, else asyncio's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


async def _run(config: SiteConfig) -> int:
    harden_parent()  # keys live here: nobody may look into this process
    key, trust = identity_of(config)
    offered(config)  # impossible settings are said now, not when the broker answers
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    journal = Journal(config.state_dir / "journal.db")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    control, payloads = await _connect(config, "control", stop), await _connect(config, "payloads", stop)
    cargo = Cargo(payloads.streams, NatsBulk.beside(payloads))
    agent = SiteAgent(config, key, trust, journal, control.bus, control.streams, cargo, direct_keeper(config))
    try:
        await agent.start()
        announcing = asyncio.create_task(_announce(agent, config))
        await stop.wait()
        announcing.cancel()
        log.info("draining")
        # Whatever hangs: hosts die with this process, and what was not acknowledged is in the journal.
        asyncio.get_running_loop().call_later(DRAIN_S + _CLOSE_S, os._exit, 1)
        await agent.drain(DRAIN_S)
    finally:
        await agent.close()
        await cargo.close()
        await payloads.close()
        await control.close()
    return 0


async def _announce(agent: SiteAgent, config: SiteConfig) -> None:
    await agent.heartbeat.answered.wait()
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"ready": True, "site": config.site}), flush=True)


async def _connect(config: SiteConfig, name: str, stop: asyncio.Event) -> Connection:
    """Connect, however long the broker is away; raises ConfigError for a password file, NotConnectedError at a stop."""
    broker, password = config.broker, read_password(config.broker)
    while True:
        try:
            return await connect(broker.url, name=f"site {config.site} {name}", user=broker.user, password=password)
        except NotConnectedError as error:
            if stop.is_set():
                raise
            log.warning("waiting for the broker: %s", error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CONNECT_AGAIN_S):
                await stop.wait()


async def _check(config: SiteConfig) -> int:
    worst = 0
    async for level, text in checks(config):
        typer.echo(f"{level:<5}{text}")
        worst = max(worst, ("ok", "warn", "fail").index(level))
    return 1 if worst == 2 else 0


def identity_of(config: SiteConfig) -> tuple[PrivateKey, TrustStore]:
    """Return the site's key and trust store; raises ConfigError when they do not fit together or the settings."""
    key, trust = PrivateKey.load(config.key_file), TrustStore.load(config.trust_file)
    if trust.federation != config.federation:
        raise ConfigError(
            f"The trust store {config.trust_file} is of the federation {trust.federation}, not {config.federation}."
        )
    if not any(identity.role is Role.COORDINATOR for identity in trust.identities()):
        raise ConfigError(
            f"The trust store {config.trust_file} names no coordinator; enrol one before the site starts."
        )
    return key, trust


if __name__ == "__main__":
    main()
