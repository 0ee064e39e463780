"""What a client sends with `POST /request`, read strictly: versions, length, model key, environment, compression."""

from __future__ import annotations

import json

import zstandard
from fastapi import Request
from fastapi.exceptions import HTTPException

from edif_mesh.client.mesh import JobSpec
from edif_mesh.domain.job import JobClass
from edif_mesh.domain.site import Versions
from edif_mesh.gateway.model_keys import parse_model_key

MAX_PAYLOAD_BYTES = 1 << 30
MIN_NNSIGHT = (0, 8)
MAX_ENV_TEXT = 1_000
UPGRADE = "This mesh speaks the protocol of nnsight 0.8. Your client is older: pip install -U 'nnsight>=0.8'"


def job_spec(data: str, payload: bytes, client: Versions) -> tuple[JobSpec, str]:
    """Return what the form field `data` asks for, and the session it names ("" when the client will poll)."""
    try:
        value = json.loads(data)
        key, session, compress, env = (
            value["model_key"],
            value.get("session_id") or "",
            value.get("compress"),
            value.get("env"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HTTPException(
            400, "The request's `data` is not what nnsight 0.8 sends. Is nnsight up to date?"
        ) from error
    env = env or {}
    if not isinstance(key, str) or not isinstance(session, str) or not isinstance(env, dict):
        raise HTTPException(400, "The request's `data` has a field of the wrong type.")
    if not all(v is None or (isinstance(v, str) and len(k) + len(v) <= MAX_ENV_TEXT) for k, v in env.items()):
        raise HTTPException(400, "The request's `env` may hold only short texts.")
    spec = JobSpec(
        model=parse_model_key(key),
        compressed=bool(compress),
        uncompressed_bytes=_declared_bytes(payload) if compress else len(payload),
        env=env,
        client=client,
        job_class=JobClass.INTERACTIVE if session else JobClass.BATCH,
    )
    return spec, session


def _declared_bytes(payload: bytes) -> int:
    """Return the size that a zstd frame declares: it goes into the order, and the runner stops decompressing there."""
    try:
        size: int = zstandard.frame_content_size(payload)
    except zstandard.ZstdError as error:
        raise HTTPException(400, "The request says that it is compressed, but it is not a zstd frame.") from error
    if size > MAX_PAYLOAD_BYTES:
        raise HTTPException(413, too_large(size))
    return size if size > 0 else MAX_PAYLOAD_BYTES


def client_versions(request: Request) -> Versions:
    """Return the client's versions; an nnsight before 0.8, or none at all, is refused with a sentence."""
    nnsight = request.headers.get("nnsight-version", "")
    parts = nnsight.split(".")[:2]
    if len(parts) < 2 or not all(p.isdigit() for p in parts) or tuple(map(int, parts)) < MIN_NNSIGHT:
        raise HTTPException(400, f"{UPGRADE} (it says that it is {nnsight[:40] or 'unknown'})")
    python = (request.headers.get("python-version", "").split() or [""])[0][:20]
    return Versions(python=python, nnsight=nnsight[:40])


def check_length(request: Request) -> None:
    """Refuse an upload that is over the limit, or of unknown length, before any of it is read."""
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        raise HTTPException(411, "The request does not say how long it is (Content-Length).")
    if int(length) > MAX_PAYLOAD_BYTES + (1 << 20):
        raise HTTPException(413, too_large(int(length)))


def too_large(size: int) -> str:
    """Say that a payload is over the limit, and what to do."""
    return (
        f"The job's payload has {size / 1e6:,.0f} MB; {MAX_PAYLOAD_BYTES / 1e6:,.0f} MB are allowed. Do not capture large tensors in the "
        "traced block: build them inside it, or send a smaller part."
    )
