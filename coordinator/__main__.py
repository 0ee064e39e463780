"""The composition root of `edif-coordinator`: reads the settings, chooses the adapters, runs until told to stop."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.shell.logs import set_up_logs
from coordinator.shell.service import Service
from coordinator.storage.engine import sqlite_path
from edif_mesh.config import CoordinatorConfig, load_config, read_password
from edif_mesh.errors import ConfigError, EdifError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import TrustStore
from edif_mesh.transport.nats_bus import Connection, connect
from edif_mesh.wire.messages import Role

log = logging.getLogger("coordinator")
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="The coordinator of an eDIF Mesh."
)
ConfigFile = Annotated[Path, typer.Option("--config", help="The coordinator's settings (TOML).")]


@app.command()
def run(config: ConfigFile) -> None:
    """Run the coordinator until SIGTERM or Ctrl-C; prints one line of JSON once it serves."""
    settings = _or_exit(lambda: load_config(CoordinatorConfig, config))
    set_up_logs(settings.log_level)
    failure = _in_loop(_serve(settings))
    if failure is not None:
        typer.echo(str(failure), err=True)
        raise typer.Exit(2 if isinstance(failure, ConfigError) else 1)


@app.command()
def check(config: ConfigFile) -> None:
    """Read the settings, the key and the trust store, and say whether a coordinator could start with them."""

    def look() -> str:
        settings = load_config(CoordinatorConfig, config)
        _check_log_level(settings.log_level)
        key, _ = _identity(settings)
        sqlite_path(settings.database_url)
        read_password(settings.broker)
        return f"The settings are good: federation {settings.federation}, coordinator key {key.id}."

    typer.echo(_or_exit(look))


async def _serve(settings: CoordinatorConfig) -> EdifError | None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        key, trust = _identity(settings)
        password = read_password(settings.broker)
        system = await _connect_system(settings)
        connection = await connect(
            settings.broker.url, name=f"coordinator-{settings.federation}", user=settings.broker.user, password=password
        )
    except EdifError as error:
        return error
    try:
        service = Service(settings, key, trust, connection.bus, connection.streams, system.bus if system else None)
        try:
            await service.start()
            print(json.dumps({"ready": True, "http": service.url, "epoch": service.epoch}), flush=True)
            return await service.run_until(stop)
        finally:
            await service.close()
    except EdifError as error:
        return error
    finally:
        await connection.close()
        if system is not None:
            await system.close()


async def _connect_system(settings: CoordinatorConfig) -> Connection | None:
    """Connect to the broker's system account, where the settings name a user of it."""
    if settings.system_user is None:
        return None
    password = read_password(replace(settings.broker, password_file=settings.system_password_file))
    return await connect(settings.broker.url, name="coordinator system", user=settings.system_user, password=password)


def _identity(settings: CoordinatorConfig) -> tuple[PrivateKey, TrustStore]:
    key, trust = PrivateKey.load(settings.key_file), TrustStore.load(settings.trust_file)
    if trust.federation != settings.federation:
        raise ConfigError(
            f"trust_file: {settings.trust_file} is of federation {trust.federation!r}, not {settings.federation!r}."
        )
    mine = [identity for identity in trust.identities() if identity.key == key.id]
    if not mine or mine[0].role is not Role.COORDINATOR:
        raise ConfigError(
            f"key_file: the key {key.id} is not enrolled as coordinator in {settings.trust_file}; sites would refuse it."
        )
    return key, trust


def _check_log_level(level: str) -> None:
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(f"log_level: {level!r} is none of DEBUG, INFO, WARNING, ERROR.")


def _in_loop(main: Coroutine[Any, Any, EdifError | None]) -> EdifError | None:
    try:
        import uvloop
    except ImportError:  # not made for this platform; the usual loop is right, only slower
        return asyncio.run(main)
    return uvloop.run(main)


def _or_exit(action: Any) -> Any:
    try:
        return action()
    except EdifError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
