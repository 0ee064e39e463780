"""A site's own endpoint for tests: a real store, a real process that serves it, and whoever asks."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from edif_mesh.domain.ids import AttemptNumber, FederationId, JobId, SiteId
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import Identity, TrustStore
from edif_mesh.results.index import CHUNK_BYTES, Index
from edif_mesh.results.manifest import ManifestParts
from edif_mesh.results.paths import Paths
from edif_mesh.results.transfer import AsIs, ResultWriter
from edif_mesh.transport.embedded import free_port
from edif_mesh.transport.ports import Bulk
from edif_mesh.wire.envelope import seal
from edif_mesh.wire.messages import DirectEndpoint, FetchResult, Manifest, Role
from site_agent.direct.certificate import certificate
from site_agent.direct.endpoint import EndpointSettings
from site_agent.direct.store import KeepingForm, ResultStore
from tests.builders_transfer import a_manifest

SITE, ONE = SiteId("ansbach"), AttemptNumber(1)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class DirectSite:
    """One site's folder, keys and endpoint process."""

    folder: Path
    keep_bytes: int = 8 << 30
    owner: PrivateKey = field(default_factory=PrivateKey.generate)
    other: PrivateKey = field(default_factory=PrivateKey.generate)
    stranger: PrivateKey = field(default_factory=PrivateKey.generate)
    revoked: PrivateKey = field(default_factory=PrivateKey.generate)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        people = {"ada": self.owner, "bob": self.other, "eve": self.revoked}
        self.trust = TrustStore(FederationId("fed"), (), self.folder / "trust.json")
        for name, key in people.items():
            self.trust.enrol(Identity(key.public.hex(), Role.RESEARCHER, name))
        self.trust.revoke(self.revoked.id, 1)
        self.store = ResultStore(self.folder / "results", self.keep_bytes, 3_600_000)
        self.digest = certificate(self.folder / "certificate.pem", SITE)
        self.port = free_port()

    @property
    def endpoint(self) -> DirectEndpoint:
        return DirectEndpoint(f"https://127.0.0.1:{self.port}", self.digest)

    def start(self) -> None:
        settings = EndpointSettings(
            SITE,
            "127.0.0.1",
            self.port,
            str(self.folder / "certificate.pem"),
            str(self.folder / "trust.json"),
            str(self.folder / "results"),
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "site_agent.direct.endpoint", settings.text()], stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with contextlib.suppress(OSError):
                self.process.stdout.close()  # type: ignore[union-attr]
            self.process = None

    async def write(self, bulk: Bulk, job: JobId, data: bytes) -> Manifest:
        """Store a result at the broker and here, as an attempt does, and say where."""
        keeping = self.store.open(job, ONE, self.owner.id)
        writer = ResultWriter(bulk, job, ONE, form=KeepingForm(AsIs(), keeping))
        await writer.feed(data)
        parts = await writer.finish()
        served = keeping.finish(parts.index)
        return replace(a_manifest(job, ONE, parts), direct=(self.endpoint,) if served else ())

    def keep(self, job: JobId, data: bytes | memoryview) -> Manifest:
        """Keep a result here only."""
        keeping, view = self.store.open(job, ONE, self.owner.id), memoryview(data)
        form = KeepingForm(AsIs(), keeping)
        starts = range(0, len(view), CHUNK_BYTES)
        made = [form.make(number, (view[start : start + CHUNK_BYTES],), 0) for number, start in enumerate(starts)]
        parts = ManifestParts(Index([chunk.entry for chunk in made]))
        assert keeping.finish(parts.index), "there is no room"
        return replace(a_manifest(job, ONE, parts), direct=(self.endpoint,))

    def paths(
        self, bulk: Bulk, key: PrivateKey | None = None, change: Callable[[FetchResult], FetchResult] | None = None
    ) -> Paths:
        """What a researcher's process knows of the ways."""
        return Paths(bulk, lambda asked: seal(change(asked) if change else asked, key or self.owner))


def some_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)
