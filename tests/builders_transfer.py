"""Builders for tests of results in transit."""

from __future__ import annotations

from edif_mesh.domain.attempt import Receipt
from edif_mesh.domain.ids import AttemptNumber, Digest, JobId, SiteId
from edif_mesh.results.index import Index, root_of
from edif_mesh.results.manifest import ENTRIES_IN_MANIFEST, ManifestParts, packed
from edif_mesh.wire.messages import Manifest


def a_manifest(job: JobId, attempt: AttemptNumber, parts: ManifestParts) -> Manifest:
    """What the site would sign for `parts`."""
    return Manifest(
        order_digest=Digest("0" * 64),
        job=job,
        attempt=attempt,
        site=SiteId("ansbach"),
        archive_bytes=parts.index.archive_bytes,
        stored_bytes=parts.index.stored_bytes,
        chunks=len(parts.index),
        root=root_of(parts.index.pack()),
        issued_at_ms=0,
        receipt=Receipt(),
        index=packed(parts.index) if len(parts.index) <= ENTRIES_IN_MANIFEST else "",
        lenders=parts.lenders,
        sealed_key=parts.sealed_key,
    )


def an_index_of(*sizes: int) -> Index:
    """Entries of so many bytes with made-up digests."""
    from edif_mesh.results.index import Entry

    return Index([Entry(size, size, 0, 0, 0, number, bytes([number % 256]) * 32) for number, size in enumerate(sizes)])
