"""The Python client: submit, watch, fetch, cancel; the nnsight backend.

from edif_mesh.client import BlockingMesh

with BlockingMesh() as mesh:
    with model.trace("Hello", backend=mesh.backend(model)):
        hidden = model.transformer.h[0].output.save()
"""

from edif_mesh.client.blocking import BlockingMesh
from edif_mesh.client.job import Job
from edif_mesh.client.mesh import JobSpec, Mesh

__all__ = ["BlockingMesh", "Job", "JobSpec", "Mesh"]
