"""A result's manifest: how the site builds it, and what the researcher checks before believing it."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from edif_mesh.domain.attempt import Receipt
from edif_mesh.domain.ids import AttemptNumber, Digest, SiteId, is_digest
from edif_mesh.errors import ManifestError
from edif_mesh.results.index import CHUNK_BYTES, ENTRY, MAX_ENTRIES, OWN, Index, root_of, unpack_entries
from edif_mesh.wire.messages import DirectEndpoint, Lender, Manifest, Order, ResultPart

FORMAT = "edif-archive-2"
MAX_ARCHIVE_BYTES = 1 << 44
ENTRIES_IN_MANIFEST = 8
"""A result of so many chunks needs no index of its own: it travels in the manifest."""


@dataclass(frozen=True, slots=True)
class ManifestParts:
    """What the writer of an archive knows of it when the last chunk is stored."""

    index: Index
    lenders: tuple[Lender, ...] = ()
    sealed_key: str = ""


def build_manifest(
    order: Order,
    order_digest: Digest,
    attempt: AttemptNumber,
    site: SiteId,
    parts: ManifestParts,
    *,
    receipt: Receipt,
    now_ms: int,
    direct: tuple[DirectEndpoint, ...] = (),
) -> Manifest:
    """Return the manifest that the site signs."""
    raw = parts.index.pack()
    return Manifest(
        order_digest=order_digest,
        job=order.job,
        attempt=attempt,
        site=site,
        archive_bytes=parts.index.archive_bytes,
        stored_bytes=parts.index.stored_bytes,
        chunks=len(parts.index),
        root=root_of(raw),
        issued_at_ms=now_ms,
        receipt=receipt,
        index=packed(parts.index) if len(parts.index) <= ENTRIES_IN_MANIFEST else "",
        lenders=parts.lenders,
        sealed_key=parts.sealed_key,
        direct=direct,
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
    if manifest.format != FORMAT:
        raise ManifestError(f"The result has the unknown format {manifest.format[:40]!r}.")
    if not is_digest(manifest.root):
        raise ManifestError("The manifest's root is no SHA-256.")
    if not 0 < manifest.archive_bytes <= MAX_ARCHIVE_BYTES:
        raise ManifestError(f"A result of {manifest.archive_bytes} bytes cannot be.")
    if not -(-manifest.archive_bytes // CHUNK_BYTES) <= manifest.chunks <= min(MAX_ENTRIES, manifest.archive_bytes):
        raise ManifestError(f"{manifest.archive_bytes} bytes do not make {manifest.chunks} chunks.")
    if manifest.index:
        embedded_index(manifest)
    elif manifest.chunks <= ENTRIES_IN_MANIFEST:
        raise ManifestError("The manifest lacks its index.")


def embedded_index(manifest: Manifest) -> Index | None:
    """Return the index that travels in the manifest, None when it is not there; raises ManifestError."""
    if not manifest.index:
        return None
    return check_index(manifest, _base64(manifest.index))


def check_index(manifest: Manifest, raw: bytes | bytearray) -> Index:
    """Return the index whose bytes are `raw` once all in it fits the manifest; raises ManifestError."""
    if root_of(bytes(raw)) != manifest.root:
        raise ManifestError("The index of the result is altered: it does not fit the manifest; nothing was accepted.")
    index = Index(unpack_entries(raw))
    if len(index) != manifest.chunks or index.archive_bytes != manifest.archive_bytes:
        raise ManifestError(
            f"The index has {len(index)} chunks of {index.archive_bytes} bytes together; the manifest says "
            f"{manifest.chunks} of {manifest.archive_bytes}."
        )
    if index.stored_bytes != manifest.stored_bytes:
        raise ManifestError(f"The index stores {index.stored_bytes} bytes; the manifest says {manifest.stored_bytes}.")
    for number, entry in enumerate(index.entries):
        if entry.lender > len(manifest.lenders) or (entry.lender == OWN and entry.number != number):
            raise ManifestError(f"The index says of chunk {number} that it lies where the manifest names nobody.")
    return index


def index_bytes(manifest: Manifest) -> int:
    """Return how long the packed index is."""
    return manifest.chunks * ENTRY.size


def part_index(part: ResultPart) -> Index:
    """Return the entries of a part; raises ManifestError."""
    return Index(unpack_entries(_base64(part.entries)))


def packed(index: Index) -> str:
    """Return entries as a manifest or a part carries them."""
    return base64.b64encode(index.pack()).decode()


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ManifestError("The index in the manifest is no base64.") from error
