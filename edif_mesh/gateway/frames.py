"""The frames of nnsight's remote protocol: one JSON object a status; any status outside its list kills the client."""

from __future__ import annotations

import io
import json
from typing import Any

from edif_mesh.domain.attempt import AttemptStatus
from edif_mesh.domain.job import JobStatus
from edif_mesh.wire.messages import JobSnapshot

_STATUS = {
    JobStatus.QUEUED: "QUEUED",
    JobStatus.PLACED: "DISPATCHED",
    JobStatus.RUNNING: "RUNNING",
    JobStatus.SUCCEEDED: "COMPLETED",
}


def status_of(snapshot: JobSnapshot) -> str:
    """Return nnsight's word for a job's state."""
    current = snapshot.attempts[-1].status if snapshot.attempts else None
    if snapshot.status is JobStatus.PLACED and current is AttemptStatus.LOADING:
        return "DEPLOYING"
    return _STATUS.get(snapshot.status, "ERROR")


def frame(
    job: str, status: str, text: str = "", data: Any = None, meta: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return one frame as a JSON-able object."""
    return {"id": job, "status": status, "description": text, "data": data, "meta": meta}


def snapshot_frame(snapshot: JobSnapshot) -> dict[str, Any]:
    """Return the frame of a state that is not COMPLETED; an ERROR carries the failure's own text."""
    status = status_of(snapshot)
    text = snapshot.failure.text if status == "ERROR" and snapshot.failure is not None else snapshot.text
    return frame(snapshot.job, status, text, meta=meta_of(snapshot) if status == "ERROR" else None)


def meta_of(snapshot: JobSnapshot) -> dict[str, Any]:
    """Return what the run cost, for `tracer.backend.meta`: seconds, bytes, site, attempt, and `runtime` as nnsight names it."""
    last = snapshot.attempts[-1] if snapshot.attempts else None
    receipt = last.receipt if last is not None else None
    meta: dict[str, Any] = {
        "job": snapshot.job,
        "site": snapshot.site or (last.site if last else None),
        "attempt": last.attempt if last else 0,
        "queued_s": round(
            ((last.granted_at_ms if last else snapshot.updated_at_ms) - snapshot.submitted_at_ms) / 1000, 3
        ),
    }
    if receipt is not None:
        meta |= {
            "runtime": receipt.wall_ms / 1000,
            "runtime_s": receipt.wall_ms / 1000,
            "cpu_s": receipt.cpu_ms / 1000,
            "memory_bytes": receipt.peak_memory_bytes,
            "result_bytes": receipt.result_bytes,
            "device": receipt.device,
            "device_memory_bytes": receipt.device_memory_bytes,
            "log_bytes": receipt.log_bytes,
            "sandbox": receipt.sandbox,
            "load_s": receipt.load_ms / 1000,
        }
    return meta


def binary_frame(value: dict[str, Any]) -> bytes:
    """Return a COMPLETED frame with the result's blob inside (`data`), as `ResponseModel.unpickle` reads it."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=4)
    return buffer.getvalue()


def text_frame(value: dict[str, Any]) -> str:
    """Return a frame as the text that is sent."""
    return json.dumps(value)
