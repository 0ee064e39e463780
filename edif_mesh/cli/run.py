"""`edif run` and `edif submit`: a researcher's own script, with its `remote=True` pointed at the mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx

from edif_mesh.config import ClientConfig, home, load_config
from edif_mesh.errors import ConfigError, NotFoundError


def run_script(*, script: Path, arguments: tuple[str, ...], wait: bool) -> int:
    """Run the script in a Python of its own and return its exit code."""
    if not script.is_file():
        raise NotFoundError(f"There is no script {script}.")
    path = home() / "client.toml"
    config = load_config(ClientConfig, path)
    url = f"http://{config.gateway_host}:{config.gateway_port}"
    gateway = None if _answers(url) else _start_gateway(path)
    if gateway is not None:
        url = gateway[1]
    environment = {**os.environ, "NDIF_HOST": url, "EDIF_WAIT": "1" if wait else "0"}
    try:
        command = [sys.executable, "-m", "edif_mesh.cli.script", str(script), *arguments]
        return subprocess.run(command, env=environment, check=False).returncode
    finally:
        if gateway is not None:
            gateway[0].terminate()
            gateway[0].wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ping", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def _start_gateway(config: Path) -> tuple[subprocess.Popen[str], str]:
    """Start a personal gateway on a port of its own for as long as the script runs."""
    from edif_mesh.transport.embedded import free_port

    command = [sys.executable, "-m", "edif_mesh.gateway", "--config", str(config), "--port", str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        assert process.stderr is not None
        last = (process.stderr.read().strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"No gateway could be started: {last}")
    return process, str(json.loads(line)["url"])
