"""A thin blocking face of the client: the same calls, run on an event loop in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from edif_mesh.client.job import Job
from edif_mesh.client.mesh import JobSpec, Mesh
from edif_mesh.config import ClientConfig
from edif_mesh.domain.attempt import Receipt
from edif_mesh.errors import ResultError
from edif_mesh.wire.messages import JobSnapshot, MeshView

if TYPE_CHECKING:
    from edif_mesh.client.backend import MeshBackend
    from edif_mesh.results.lazy import LazyResult

T = TypeVar("T")


class BlockingMesh:
    """`Mesh` for scripts and notebooks without asyncio: `with BlockingMesh() as mesh`."""

    def __init__(self, config: ClientConfig | Path | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="edif-mesh", daemon=True)
        self._thread.start()
        try:
            self.mesh = self.run(Mesh.connect(config))
        except BaseException:
            self._stop()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the client and return its result; Ctrl-C cancels it.

        Raises ResultError in the client's own thread, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise ResultError("A callback of the client cannot wait for the client: note what you want, and ask later.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def submit(self, payload: bytes, spec: JobSpec) -> BlockingJob:
        """See `Mesh.submit`."""
        return BlockingJob(self, self.run(self.mesh.submit(payload, spec)))

    def job(self, job: str) -> BlockingJob:
        """See `Mesh.job`."""
        return BlockingJob(self, self.mesh.job(job))

    def jobs(self, limit: int = 50) -> tuple[JobSnapshot, ...]:
        """See `Mesh.jobs`."""
        return self.run(self.mesh.jobs(limit))

    def view(self) -> MeshView:
        """See `Mesh.view`."""
        return self.run(self.mesh.view())

    def backend(self, model: Any, **options: Any) -> MeshBackend:
        """See `Mesh.backend`; blocks until the job has ended."""
        from edif_mesh.client.backend import MeshBackend

        return MeshBackend(self, model, **options)

    def close(self) -> None:
        """Close the connection and the thread."""
        if self._thread.is_alive():
            try:
                self.run(self.mesh.close())
            finally:
                self._stop()

    def __enter__(self) -> BlockingMesh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._loop.is_running():
            self._loop.close()


class BlockingJob:
    """`Job` without asyncio."""

    def __init__(self, mesh: BlockingMesh, job: Job) -> None:
        self._mesh, self._job = mesh, job
        self.id = job.id

    def status(self, *, explain: bool = False) -> JobSnapshot:
        """See `Job.status`."""
        return self._mesh.run(self._job.status(explain=explain))

    def wait(self, on_update: Callable[[JobSnapshot], None] | None = None) -> JobSnapshot:
        """See `Job.wait`."""
        return self._mesh.run(self._job.wait(on_update))

    def logs(self) -> list[str]:
        """Return what the job has printed so far."""

        async def collect() -> list[str]:
            return [line async for line in self._job.logs()]

        return self._mesh.run(collect())

    def result(
        self,
        *,
        on_update: Callable[[JobSnapshot], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        classes: dict[str, type] | None = None,
    ) -> dict[str, Any]:
        """See `Job.result`."""
        return self._mesh.run(self._job.result(on_update=on_update, progress=progress, classes=classes))

    def open(self, *, classes: dict[str, type] | None = None) -> LazyResult:
        """See `Job.open`; `result["acts"][:, -1]` fetches what it needs."""
        return self._mesh.run(self._job.open(classes=classes, run=self._mesh.run))

    def receipt(self) -> Receipt | None:
        """See `Job.receipt`."""
        return self._mesh.run(self._job.receipt())

    def cancel(self, reason: str = "cancelled by the researcher") -> JobSnapshot:
        """See `Job.cancel`."""
        return self._mesh.run(self._job.cancel(reason))

    def delete(self) -> JobSnapshot:
        """See `Job.delete`."""
        return self._mesh.run(self._job.delete())

    def __repr__(self) -> str:
        return repr(self._job)
