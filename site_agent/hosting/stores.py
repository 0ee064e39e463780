"""Which kind of shared memory a model uses, by its device, and the stores of one process, by the device of each segment.

The kinds: "" is the fork host (weights are inherited, nothing is mapped). `cuda` takes `cuda_vmm`, which runners map
read-only, where the driver can, else `cuda_ipc`, which they could write to. `shared_memory` and `shared_memory_writable` do the
same on the CPU and are for tests: they run all that is not CUDA itself.
"""

from __future__ import annotations

import logging

from edif_mesh.errors import ModelLoadError
from site_agent.hosting.cuda_segments import CudaIpc, CudaVmm
from site_agent.hosting.manifest import Segment
from site_agent.hosting.segments import Handle, Mapped, SegmentStore, SharedMemory
from site_agent.hosting.spec import ModelSpec

log = logging.getLogger(__name__)

SHARED_MEMORY, SHARED_MEMORY_WRITABLE = "shared_memory", "shared_memory_writable"
CUDA, CUDA_VMM, CUDA_IPC = "cuda", "cuda_vmm", "cuda_ipc"


def choose_sharing(spec: ModelSpec, devices: list[str]) -> str:
    """Return the kind that the owner of `spec` uses on `devices`; starts CUDA there when it has to try. Raises ModelLoadError."""
    if spec.sharing != CUDA:
        return spec.sharing
    if not (problem := CudaVmm.problem([device for device in devices if device != "cpu"])):
        return CUDA_VMM
    log.warning("weights are shared by CUDA IPC", extra={"model": spec.repo_id, "text": problem})
    return CUDA_IPC


_CUDA: dict[str, type[CudaVmm] | type[CudaIpc]] = {CUDA_VMM: CudaVmm, CUDA_IPC: CudaIpc}


class Stores:
    """All stores of one process. Segments on the CPU are shared memory in every kind."""

    def __init__(self, sharing: str) -> None:
        self._cpu: SegmentStore = SharedMemory(writable=sharing == SHARED_MEMORY_WRITABLE)
        self._cuda: SegmentStore | None = None
        self._sharing = sharing
        self._order: list[SegmentStore] = []

    def create(self, segment: Segment) -> Mapped:
        """As `SegmentStore.create`."""
        store = self._of(segment.device)
        self._order.append(store)
        return store.create(segment)

    def publish(self) -> list[tuple[Handle, int]]:
        """As `SegmentStore.publish`, in the order in which the segments were created."""
        published = {id(store): iter(store.publish()) for store in dict.fromkeys(self._order)}
        return [next(published[id(store)]) for store in self._order]

    def attach(self, handle: Handle, descriptor: int) -> Mapped:
        """As `SegmentStore.attach`."""
        return self._of(handle.device).attach(handle, descriptor)

    def _of(self, device: str) -> SegmentStore:
        if device == "cpu":
            return self._cpu
        if self._sharing not in _CUDA:
            raise ModelLoadError(f"Weights on {device} cannot be shared as memory of the CPU.")
        if self._cuda is None:
            self._cuda = _CUDA[self._sharing]()
        return self._cuda
