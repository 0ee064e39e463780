"""`edif run` and `edif submit`: a researcher's own script, with its `remote=True` pointed at the mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx

from edif_mesh.client.limits import with_limits
from edif_mesh.client.travel import with_results
from edif_mesh.config import ClientConfig, home, load_config
from edif_mesh.errors import ConfigError, NotFoundError, error_of
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.models import hub_answers, told_offline
from edif_mesh.transport.embedded import die_with_parent, free_port


def run_script(
    *, script: Path, arguments: tuple[str, ...], wait: bool, limits: tuple[str, ...] = (), results: tuple[str, ...] = ()
) -> int:
    """Run the script in a Python of its own and return its exit code; `limits` and `results` are for its jobs only."""
    if not script.is_file():
        raise NotFoundError(f"There is no script {script}.")
    path = home() / "client.toml"
    config = load_config(ClientConfig, path)
    url = f"http://{config.gateway_host}:{config.gateway_port}"
    with_limits(config.limits, limits)  # a mistake is said before anything starts
    with_results(config.results, results)
    own = [*(f"--limit={limit}" for limit in limits), *(f"--result={setting}" for setting in results)]
    shared = not own and _serves(url, config)
    with nullcontext(url) if shared else _own_gateway(path, own) as url:
        environment = {**os.environ, "NDIF_HOST": url, "EDIF_WAIT": "1" if wait else "0"}
        if not told_offline() and not hub_answers():
            print("The Hugging Face hub does not answer: the script gets models from the local cache.", file=sys.stderr)
            environment["HF_HUB_OFFLINE"] = "1"  # otherwise its libraries ask again and again for every file
        command = [sys.executable, "-m", "edif_mesh.cli.script", str(script), *arguments]
        code = subprocess.run(command, env=environment, check=False).returncode
    return code if code >= 0 else 128 - code


def _serves(url: str, config: ClientConfig) -> bool:
    """Whether a gateway with our own key answers there: another one would sign in another name, for another mesh."""
    try:
        answer = httpx.get(f"{url}/whoami", timeout=2)
        return answer.status_code == 200 and answer.json().get("key") == PrivateKey.load(config.key_file).id
    except (httpx.HTTPError, ValueError, AttributeError):
        return False


@contextmanager
def _own_gateway(config: Path, options: list[str]) -> Iterator[str]:
    """Run a personal gateway on a port of its own for as long as the script runs; yields its URL."""
    command = [sys.executable, "-m", "edif_mesh.gateway", "--config", str(config), "--port", str(free_port())]
    command += options
    with tempfile.TemporaryFile("w+") as log:  # not a pipe: nobody reads it while the script runs
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=die_with_parent
        )
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline() or "{}")
            if "url" not in said:
                process.wait()
                log.seek(0)
                last = (log.read().strip().splitlines() or ["no reason given"])[-1]
                error = said.get("error") or {"code": ConfigError.code, "text": f"No gateway could be started: {last}"}
                raise error_of(error["code"], error["text"])
            yield str(said["url"])
        finally:
            process.terminate()
            process.wait()
