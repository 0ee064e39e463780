"""Results for the unmodified client: decoded from the verified archive and written anew as the `torch.save` it loads.

The client unpickles what it downloads, so bytes that came from a site are never forwarded: only values that the strict
archive reader has rebuilt are written. Blobs are kept on disk for a while, so that a download can be repeated; after that
they are made again, at the same address, for as long as the mesh keeps the result.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hmac
import io
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edif_mesh.domain.ids import is_job_id
from edif_mesh.errors import StoreFullError
from edif_mesh.results.archive import read

KEEP_S = 24 * 3600
KEEP_BYTES = 16 << 30
INLINE_BYTES = 4 << 20


class ResultStore:
    """Blobs by job id, on disk; each behind a token that nobody guesses and that stays the same."""

    def __init__(self, folder: Path, secret: bytes, keep_bytes: int = KEEP_BYTES) -> None:
        self.folder, self._secret, self._keep_bytes = folder, secret, keep_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)

    def is_small(self, archive: memoryview) -> bool:
        """Whether a result may travel inside the last frame, instead of as a download."""
        return len(archive) <= INLINE_BYTES

    def keep(self, job: str, archive: memoryview, compress: bool) -> None:
        """Write a verified archive's values as a blob (runs in a thread).

        Raises ArchiveError, and StoreFullError when this machine's disk is full.
        """
        from edif_mesh.results.torchfile import write_values

        values = read(archive)
        part = self.folder / f"{job}.{secrets.token_hex(4)}.part"
        try:
            write_values(values, part, compress=compress)
            part.replace(self._path(job))
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFullError(
                    f"The disk under {self.folder} is full, so the result could not be written there. The mesh keeps it: free "
                    f"some space and type: edif fetch {job} -o FILE.safetensors"
                ) from error
            raise
        self.prune()

    def find(self, job: str) -> Path | None:
        """Return the blob's file, or None."""
        path = self._path(job)
        return path if is_job_id(job) and path.is_file() else None

    def token(self, job: str) -> str:
        """Return what must follow the job's id in the address of its blob."""
        return base64.urlsafe_b64encode(hmac.digest(self._secret, job.encode(), "sha256")[:18]).decode()

    def opens(self, job: str, token: str) -> bool:
        """Whether `token` is the job's."""
        return hmac.compare_digest(token.encode(), self.token(job).encode())

    def prune(self) -> None:
        """Remove blobs older than a day, and the oldest beyond a bound; they can be made again from the mesh."""
        kept = 0
        for age, size, path in sorted(_facts(path) for path in self.folder.glob("*.pt")):
            kept += size
            if age > KEEP_S or (kept > self._keep_bytes and kept != size):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _path(self, job: str) -> Path:
        return self.folder / f"{job}.pt"


def decode(archive: memoryview, compress: bool) -> bytes:
    """Return a verified archive's values as the client loads them; raises ArchiveError."""
    return dump(read(archive), compress)


def dump(values: Mapping[str, Any], compress: bool) -> bytes:
    """Return the `torch.save` of `values`; with `compress`, in exactly one zstd frame that declares its size."""
    from edif_mesh.results.torchfile import write_values

    buffer = io.BytesIO()
    write_values(values, buffer, compress=compress)
    return buffer.getvalue()


def warm_up() -> None:
    """Import what the first result needs (torch takes seconds), so that no client waits for it."""
    dump({}, compress=True)


def _facts(path: Path) -> tuple[float, int, Path]:
    try:
        info = os.stat(path)
    except OSError:
        return 0.0, 0, path
    return time.time() - info.st_mtime, info.st_size, path
