"""The researcher's outbox: orders and payloads on disk until the coordinator has recorded them, then a small receipt.

Files in `outbox_dir`: `JOB.order` (the envelope), `JOB.payload`; once recorded only `JOB.order` stays, because its digest
proves later which result is ours; of a refused order only `JOB.refused` stays, with the reason. All writes are atomic and
synced.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from pathlib import Path

from edif_mesh.domain.ids import JobId, is_job_id
from edif_mesh.domain.job import Failure
from edif_mesh.errors import StoreFullError

_KEEP_ORDERS = 10_000
_STRAY_S = 86_400


class Outbox:
    """Orders that were signed here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def keep(self, job: JobId, order: str, payload: bytes) -> None:
        """Store order and payload durably; raises StoreFullError."""
        try:
            self._write(self.folder / f"{job}.payload", payload)
            self._write(self.folder / f"{job}.order", order.encode())
            self._sync_folder()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFullError(
                    f"The disk under {self.folder} is full, so the job was not submitted. Free some space and try again."
                ) from error
            raise

    def recorded(self, job: JobId) -> None:
        """The coordinator has it: the payload may go."""
        (self.folder / f"{job}.payload").unlink(missing_ok=True)

    def refused(self, job: JobId, failure: Failure) -> None:
        """The coordinator refused it: only the reason is kept. It is there before the payload goes."""
        self._write(self.folder / f"{job}.refused", json.dumps([failure.code, failure.text]).encode())
        self.withdrawn(job)

    def refusal(self, job: JobId) -> Failure | None:
        """Return why the coordinator refused an order that was signed here, or None."""
        try:
            code, text = json.loads((self.folder / f"{job}.refused").read_text())
        except FileNotFoundError:
            return None
        return Failure(code, text)

    def withdrawn(self, job: JobId) -> None:
        """It was never sent: nothing is kept."""
        self.recorded(job)
        (self.folder / f"{job}.order").unlink(missing_ok=True)

    def order(self, job: JobId) -> str | None:
        """Return the order that was signed here, or None when it was signed elsewhere."""
        try:
            return (self.folder / f"{job}.order").read_text()
        except FileNotFoundError:
            return None

    def waits(self, job: JobId) -> bool:
        """Whether the payload is kept still: no coordinator is known to have recorded the job."""
        return (self.folder / f"{job}.payload").exists()

    def payload(self, job: JobId) -> bytes | None:
        """Return the payload while it is kept."""
        try:
            return (self.folder / f"{job}.payload").read_bytes()
        except FileNotFoundError:
            return None

    def unrecorded(self) -> list[JobId]:
        """Return the jobs that no coordinator is known to have recorded, oldest first."""
        names = sorted(path.stem for path in self.folder.glob("*.payload"))
        return [JobId(name) for name in names if is_job_id(name) and (self.folder / f"{name}.order").exists()]

    def prune(self) -> None:
        """Forget the oldest receipts beyond a bound, and what a crash left half written a day ago."""
        for path in [*self.folder.glob("*.new"), *self.folder.glob("*.payload")]:
            if path.suffix == ".new" or not path.with_suffix(".order").exists():
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _STRAY_S:
                        path.unlink()
        for kind in ("*.order", "*.refused"):
            for path in sorted(self.folder.glob(kind))[:-_KEEP_ORDERS]:
                if not path.with_suffix(".payload").exists():
                    path.unlink(missing_ok=True)

    def _sync_folder(self) -> None:
        """Make the new names durable too."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_suffix(path.suffix + ".new")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
