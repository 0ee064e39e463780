"""A result's manifest: how the site builds it, and what the researcher checks before believing it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from edif_mesh.domain.attempt import Receipt
from edif_mesh.domain.ids import AttemptNumber, Digest, SiteId, is_digest
from edif_mesh.errors import ManifestError
from edif_mesh.wire.messages import Manifest, Order

MAX_CHUNK_BYTES = (1 << 20) - (4 << 10)
"""A chunk with its headers stays below the broker's `max_payload`."""


@dataclass(frozen=True, slots=True)
class ManifestParts:
    """What the writer of an archive knows of it when the last chunk is stored."""

    archive_bytes: int
    chunk_bytes: int
    chunks: int
    root: Digest


def root_of(digests: list[bytes]) -> Digest:
    """Return the SHA-256 over the chunks' concatenated raw 32-byte SHA-256 digests."""
    return Digest(hashlib.sha256(b"".join(digests)).hexdigest())


def build_manifest(
    order: Order,
    order_digest: Digest,
    attempt: AttemptNumber,
    site: SiteId,
    parts: ManifestParts,
    *,
    receipt: Receipt,
    now_ms: int,
) -> Manifest:
    """Return the manifest that the site signs."""
    return Manifest(
        order_digest=order_digest,
        job=order.job,
        attempt=attempt,
        site=site,
        archive_bytes=parts.archive_bytes,
        chunk_bytes=parts.chunk_bytes,
        chunks=parts.chunks,
        root=parts.root,
        issued_at_ms=now_ms,
        receipt=receipt,
    )


def check_manifest(
    manifest: Manifest, order: Order, order_digest: Digest, *, site: SiteId, attempt: AttemptNumber | None = None
) -> None:
    """Check that `manifest`, whose signature the caller has verified as `site`'s, is the result of this very order.

    Raises:
        ManifestError: it belongs to another job, order, site or attempt, is over the order's limit, or its sizes lie.
    """
    for what, told, wanted in (
        ("job", manifest.job, order.job),
        ("order", manifest.order_digest, order_digest),
        ("site", manifest.site, site),
        ("attempt", manifest.attempt, manifest.attempt if attempt is None else attempt),
    ):
        if told != wanted:
            raise ManifestError(f"The manifest is of {what} {told}, not of {wanted}; the result was not accepted.")
    if not 1 <= manifest.attempt <= order.max_attempts:
        raise ManifestError(f"The manifest is of attempt {manifest.attempt}; the order allows {order.max_attempts}.")
    if manifest.archive_bytes > order.limits.result_bytes:
        raise ManifestError(
            f"The result has {manifest.archive_bytes} bytes; the order allows {order.limits.result_bytes}."
        )
    check_sizes(manifest)


def check_sizes(manifest: Manifest) -> None:
    """Check that the sizes in a manifest fit together; raises ManifestError."""
    if manifest.format != "edif-archive-1":
        raise ManifestError(f"The result has the unknown format {manifest.format[:40]!r}.")
    if not is_digest(manifest.root):
        raise ManifestError("The manifest's root is no SHA-256.")
    if not 0 < manifest.chunk_bytes <= MAX_CHUNK_BYTES:
        raise ManifestError(f"A chunk of {manifest.chunk_bytes} bytes cannot be; at most {MAX_CHUNK_BYTES} can.")
    if manifest.archive_bytes < 0 or manifest.chunks != -(-manifest.archive_bytes // manifest.chunk_bytes):
        raise ManifestError(
            f"{manifest.archive_bytes} bytes do not make {manifest.chunks} chunks of {manifest.chunk_bytes}."
        )


def chunk_size(manifest: Manifest, number: int) -> int:
    """Return how many bytes chunk `number` must have."""
    return min(manifest.chunk_bytes, manifest.archive_bytes - number * manifest.chunk_bytes)
