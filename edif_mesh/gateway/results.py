"""Results for the unmodified client: decoded from the verified archive and written anew as the `torch.save` it loads.

The client unpickles what it downloads, so bytes that came from a site are never forwarded: only values that the strict
archive reader has rebuilt are written. Blobs are kept on disk for a while, so that a download can be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import secrets
import time
from pathlib import Path
from typing import Any

from edif_mesh.results.archive import read

KEEP_S = 24 * 3600
INLINE_BYTES = 4 << 20


class ResultStore:
    """Blobs by job id, on disk; each behind an unguessable token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._tokens: dict[str, str] = {}

    async def keep(self, job: str, blob: bytes) -> str:
        """Store a blob and return its token."""
        token = self._tokens.setdefault(job, secrets.token_urlsafe(16))
        path = self._path(job, token)
        await asyncio.to_thread(_write, path, blob)
        self.prune()
        return token

    def find(self, job: str, token: str) -> Path | None:
        """Return the blob's file, or None."""
        if not job.isalnum() or not all(c.isalnum() or c in "-_" for c in token):
            return None
        path = self._path(job, token)
        return path if path.is_file() else None

    def token(self, job: str) -> str | None:
        """Return the token of a kept blob, or None."""
        token = self._tokens.get(job)
        if token is None:
            token = next((p.stem.partition(".")[2] for p in self.folder.glob(f"{job}.*.pt")), None)
        return token if token is not None and self._path(job, token).is_file() else None

    def prune(self) -> None:
        """Remove blobs older than a day; they can be made again from the mesh."""
        for path in self.folder.glob("*.pt"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > KEEP_S:
                    path.unlink()

    def _path(self, job: str, token: str) -> Path:
        return self.folder / f"{job}.{token}.pt"


def make_blob(archive: memoryview, compress: bool) -> bytes:
    """Return the verified archive's values as the client loads them (runs in a thread; raises ArchiveError)."""
    return dump(read(archive), compress)


def dump(values: dict[str, Any], compress: bool) -> bytes:
    """Return `torch.save(values)`; compressed, exactly one zstd frame that declares its size."""
    import torch

    buffer = io.BytesIO()
    torch.save(values, buffer, pickle_protocol=4)
    data = buffer.getvalue()
    if compress:
        import zstandard

        data = zstandard.ZstdCompressor(level=1).compress(data)
    return data


def _write(path: Path, blob: bytes) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_bytes(blob)
    temporary.replace(path)
