"""Builders for tests of results in transit."""

from __future__ import annotations

from edif_mesh.domain.attempt import Receipt
from edif_mesh.domain.ids import AttemptNumber, Digest, JobId, SiteId
from edif_mesh.results.manifest import ManifestParts
from edif_mesh.wire.messages import Manifest


def a_manifest(job: JobId, attempt: AttemptNumber, parts: ManifestParts) -> Manifest:
    """What the site would sign for `parts`."""
    return Manifest(
        order_digest=Digest("0" * 64),
        job=job,
        attempt=attempt,
        site=SiteId("ansbach"),
        archive_bytes=parts.archive_bytes,
        chunk_bytes=parts.chunk_bytes,
        chunks=parts.chunks,
        root=parts.root,
        issued_at_ms=0,
        receipt=Receipt(),
    )
