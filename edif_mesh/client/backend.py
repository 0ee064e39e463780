"""The nnsight backend of the mesh: `model.trace(prompt, backend=mesh.backend(model))`, without a gateway between.

With a `BlockingMesh` the saved variables are there after the block, exactly as with a local trace. With an async `Mesh`
the block only submits; `await backend` then gives the saved values by name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from edif_mesh.client.job import Job
from edif_mesh.client.mesh import JobSpec, Mesh
from edif_mesh.domain.job import JobClass, Limits
from edif_mesh.domain.site import ModelRef, Versions
from edif_mesh.wire.messages import Audience, JobSnapshot

if TYPE_CHECKING:
    from edif_mesh.client.blocking import BlockingMesh


class MeshBackend:
    """Sends a traced block as one job; `job_id` names it afterwards."""

    def __init__(
        self,
        mesh: Mesh | BlockingMesh,
        model: Any,
        *,
        limits: Limits | None = None,
        audience: Audience = Audience(),  # noqa: B008
        name: str = "",
        job_class: JobClass = JobClass.INTERACTIVE,
        sandbox: str = "",
        compression: str | None = None,
        wire_dtype: str | None = None,
        sealed: bool | None = None,
        on_update: Callable[[JobSnapshot], None] | None = None,
    ) -> None:
        self._mesh = mesh
        self._model = model
        self._options: dict[str, Any] = {
            "limits": limits,
            "audience": audience,
            "name": name,
            "job_class": job_class,
            "sandbox": sandbox,
            "compression": compression,
            "wire_dtype": wire_dtype,
            "sealed": sealed,
        }
        self._on_update = on_update
        self._job: Job | None = None
        self._pending: Any = None
        self.job_id: str | None = None

    def __call__(self, tracer: Any) -> Any:
        """Called by nnsight when the block has been captured."""
        payload, spec = capture(tracer, self._model, **self._options)
        if isinstance(self._mesh, Mesh):
            self._pending = self._run(self._mesh, payload, spec)
            return self
        values = self._mesh.run(self._run(self._mesh.mesh, payload, spec))
        push_values(tracer, values)
        return values

    def __await__(self) -> Generator[Any, None, dict[str, Any]]:
        """Submit, wait, and return the saved values by name (async `Mesh` only)."""
        result: Generator[Any, None, dict[str, Any]] = self._pending.__await__()
        return result

    async def _run(self, mesh: Mesh, payload: bytes, spec: JobSpec) -> dict[str, Any]:
        job = await mesh.prepare(payload, spec, on_line=lambda line: print(line, flush=True))
        self._job, self.job_id = job, job.id
        try:
            await mesh.send(job)
            values = await job.result(on_update=self._on_update)
            for cache in (value for value in values.values() if type(value).__name__ == "CacheView"):
                object.__getattribute__(cache, "_cache").model = self._model  # it is walked like the model
            return values
        finally:
            if job.printing is not None:
                await job.printing.finish()
            await job.close()


def capture(tracer: Any, model: Any, **options: Any) -> tuple[bytes, JobSpec]:
    """Return the payload of a captured block and the spec that names its model."""
    from nnsight.ndif import pull_env
    from nnsight.schema.request import RequestModel

    pull_env()  # the researcher's own modules are then sent along by value
    payload = RequestModel.serialize(tracer, False)
    spec = JobSpec(
        model=model_ref(model),
        uncompressed_bytes=len(payload),
        env=dict(model._remoteable_get_env()),
        client=Versions(python=sys.version.split()[0], nnsight=version("nnsight")),
        **options,
    )
    return payload, spec


def model_ref(model: Any) -> ModelRef:
    """Return the model as the mesh names it. Works without a hub: the id is taken as the researcher wrote it."""
    from nnsight.modeling import huggingface

    huggingface._ID_CACHE.setdefault(model.repo_id, model.repo_id)
    key = json.loads(model.to_model_key().split(":", 1)[1])
    return ModelRef(key["repo_id"], key.get("revision"), key.get("task") or "text-generation")


def push_values(tracer: Any, values: dict[str, Any]) -> None:
    """Write the saved values into the frame of the block, as a local trace does."""
    from nnsight.tracing.tracer import save
    from nnsight.tracing.util import push

    for value in values.values():
        save(value)
    if tracer is not None and tracer.info is not None and tracer.info.frame is not None:
        push(tracer.info.frame, values)
