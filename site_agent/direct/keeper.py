"""The agent's side of the endpoint: the store that it fills, and the process that it keeps alive."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from edif_mesh.config import DirectConfig, SiteConfig
from edif_mesh.errors import ConfigError
from edif_mesh.wire.messages import DirectEndpoint
from site_agent.direct.certificate import certificate
from site_agent.direct.endpoint import EndpointSettings
from site_agent.direct.store import ResultStore

log = logging.getLogger(__name__)

_HOUR_MS = 3_600_000
_SWEEP_S = 60.0
_BACKOFF_S = (0.2, 1.0, 5.0, 15.0)
_STEADY_S = 60.0
_STOP_S = 2.0


def direct_keeper(config: SiteConfig) -> DirectKeeper | None:
    """Return the keeper of a site that serves its results itself, None for another. Raises ConfigError."""
    return DirectKeeper(config, config.direct) if config.direct is not None else None


def certificate_file(config: SiteConfig) -> Path:
    """Where the endpoint's key and certificate are."""
    return config.state_dir / "direct" / "certificate.pem"


def kept_folder(config: SiteConfig) -> Path:
    """Where the kept results are."""
    return config.state_dir / "direct" / "results"


class DirectKeeper:
    """Keeps results on this disk and a process that serves them."""

    def __init__(self, config: SiteConfig, direct: DirectConfig) -> None:
        """Make the certificate when it is missing. Raises ConfigError."""
        digest = certificate(certificate_file(config), config.site)
        try:
            self.store = ResultStore(kept_folder(config), direct.keep_bytes, direct.keep_hours * _HOUR_MS)
        except OSError as error:
            raise ConfigError(f"Results cannot be kept in {kept_folder(config)}: {error.strerror}.") from error
        self._endpoint = DirectEndpoint(direct.url, digest)
        self._settings = EndpointSettings(
            site=config.site,
            host=direct.host,
            port=direct.port,
            certificate=str(certificate_file(config)),
            trust_file=str(config.trust_file),
            folder=str(kept_folder(config)),
        )
        self.serving = asyncio.Event()
        """Set while the process listens."""

    @property
    def endpoints(self) -> tuple[DirectEndpoint, ...]:
        """What manifests name now."""
        return (self._endpoint,) if self.serving.is_set() else ()

    async def run(self) -> None:
        """Keep the process alive and the store within its time, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep())
            group.create_task(self._serve())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            await asyncio.to_thread(self.store.sweep)

    async def _serve(self) -> None:
        loop, deaths = asyncio.get_running_loop(), 0
        while True:
            began = loop.time()
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "site_agent.direct.endpoint", self._settings.text()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
            )
            try:
                assert process.stdout is not None
                if await process.stdout.readline():
                    self.serving.set()
                    log.info("results are served at %s", self._endpoint.url, extra={"pid": process.pid})
                await process.wait()
            finally:
                self.serving.clear()
                await _ended(process)
            deaths = 0 if loop.time() - began > _STEADY_S else deaths + 1
            log.error("the endpoint has ended (%s) and is started again", process.returncode)
            await asyncio.sleep(_BACKOFF_S[min(deaths, len(_BACKOFF_S)) - 1])


async def _ended(process: asyncio.subprocess.Process) -> None:
    """End the process and wait for it, also when we are being cancelled."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    waiting: Awaitable[Any] = process.wait()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(waiting, _STOP_S)
