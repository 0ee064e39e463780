"""`python -m edif_mesh.gateway --config client.toml`: the personal gateway as a process."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import socket
import sys
from dataclasses import replace
from pathlib import Path

import uvicorn

from edif_mesh.client.limits import with_limits
from edif_mesh.client.mesh import Mesh
from edif_mesh.client.travel import with_results
from edif_mesh.config import ClientConfig, home, load_config
from edif_mesh.errors import EdifError
from edif_mesh.gateway.app import create_app


def main() -> None:
    """Serve until SIGTERM or Ctrl-C; prints one JSON line when ready."""
    parser = argparse.ArgumentParser(
        prog="edif gateway", description="The endpoint of unmodified nnsight on this machine."
    )
    parser.add_argument("--config", type=Path, default=home() / "client.toml", help="the client's settings file")
    parser.add_argument("--host", help="address to listen on (default: from the settings, 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: from the settings, 8001)")
    parser.add_argument("--limit", action="append", default=[], help="NAME=VALUE, over [limits] of the settings")
    parser.add_argument("--result", action="append", default=[], help="SETTING=VALUE, over [results] of the settings")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        config = load_config(ClientConfig, given.config)
        config = replace(
            config,
            gateway_host=given.host or config.gateway_host,
            gateway_port=given.port or config.gateway_port,
            limits=with_limits(config.limits, given.limit),
            results=with_results(config.results, given.result),
        )
        serve(config)
    except EdifError as error:
        print(json.dumps({"error": {"code": error.code, "text": str(error)}}), flush=True)
        sys.exit(str(error))


def serve(config: ClientConfig) -> None:
    """Listen and serve; raises ConfigError when the port is taken."""
    from edif_mesh.errors import ConfigError

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.gateway_host, config.gateway_port))
    except OSError as error:
        raise ConfigError(
            f"Port {config.gateway_port} on {config.gateway_host} is in use by another program. Stop it, or use --port."
        ) from error
    asyncio.run(_reach_broker(config))
    settings = uvicorn.Config(
        create_app(config), log_level="warning", loop="uvloop", http="auto", ws="websockets-sansio", ws_ping_interval=None,
        ws_ping_timeout=None, ws_max_size=1 << 20, ws_per_message_deflate=False, access_log=False, timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = _Announced(settings, f"http://{config.gateway_host}:{listener.getsockname()[1]}")
    server.run(sockets=[listener])
    if not server.started:
        sys.exit(3)


async def _reach_broker(config: ClientConfig) -> None:
    """Raise a sentence when the mesh cannot be reached, instead of the web server's traceback later."""
    async with await Mesh.connect(config, name="gateway"):
        pass


class _Announced(uvicorn.Server):
    def __init__(self, settings: uvicorn.Config, url: str) -> None:
        super().__init__(settings)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(json.dumps({"ready": True, "url": self._url}), flush=True)


if __name__ == "__main__":
    main()
