"""The forms in which a chunk travels: as it is, by zstd, by zstd after its byte planes were put together.

Neighbouring activations share sign, exponent and leading digits but not the last bits: with all first bytes together, then
all second ones, ..., zstd finds what repeats. Lossless, one chunk at a time. What is opened is hostile: a chunk never takes
more memory than its index entry says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard

from edif_mesh.errors import ChunkError
from edif_mesh.results.chunks import AS_IS
from edif_mesh.results.index import Entry

ZSTD, PLANES_ZSTD = 1, 2
ELEMENTS = (2, 4, 8)
_WORTH = 0.97
"""A chunk that does not shrink at least so far travels as it is: opening it would cost more than it saves."""


def encode(plain: bytes | memoryview, element: int, level: int) -> tuple[int, bytes | memoryview]:
    """Return a chunk's form and its bytes in it; `element` bytes a number (0: unknown), `level` of zstd, 0: as it is."""
    if level == 0 or not len(plain):
        return AS_IS, plain
    planes = element in ELEMENTS
    packed = zstandard.ZstdCompressor(level=level).compress(to_planes(plain, element) if planes else plain)
    if len(packed) > _WORTH * len(plain):
        return AS_IS, plain
    return (PLANES_ZSTD if planes else ZSTD), packed


def decode(number: int, entry: Entry, form: int, stored: bytes | memoryview) -> memoryview:
    """Return the piece of the archive that chunk `number` holds; raises ChunkError that says what is wrong with it."""
    if form == AS_IS:
        return memoryview(stored)
    if form not in (ZSTD, PLANES_ZSTD) or (form == PLANES_ZSTD and entry.element not in ELEMENTS):
        raise ChunkError(f"Chunk {number} has the unknown form {entry.form}; a newer client is needed.")
    try:
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != entry.plain_bytes or frame.dict_id:
            raise ChunkError(
                f"Chunk {number} opens to {frame.content_size} bytes, not {entry.plain_bytes} as its index says."
            )
        opener = zstandard.ZstdDecompressor(max_window_size=1 << 24)
        plain = opener.decompress(stored, allow_extra_data=False, read_across_frames=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise ChunkError(f"Chunk {number} cannot be opened: {error}.") from error
    if len(plain) != entry.plain_bytes:
        raise ChunkError(f"Chunk {number} opens to {len(plain)} bytes, not {entry.plain_bytes} as its index says.")
    return memoryview(from_planes(plain, entry.element) if form == PLANES_ZSTD else plain)


def to_planes(plain: bytes | memoryview, element: int) -> memoryview:
    """Return all first bytes of the numbers, then all second ones, ...; what is left over at the end stays there."""
    flat = np.frombuffer(plain, np.uint8)
    whole = len(flat) // element * element
    out: np.ndarray[Any, np.dtype[np.uint8]] = np.empty(len(flat), np.uint8)
    for byte in range(element):
        out[byte * (whole // element) : (byte + 1) * (whole // element)] = flat[byte:whole:element]
    out[whole:] = flat[whole:]
    return memoryview(out)  # type: ignore[arg-type]


def from_planes(planes: bytes | memoryview, element: int) -> memoryview:
    """Undo `to_planes`."""
    flat = np.frombuffer(planes, np.uint8)
    whole = len(flat) // element * element
    out: np.ndarray[Any, np.dtype[np.uint8]] = np.empty(len(flat), np.uint8)
    for byte in range(element):
        out[byte:whole:element] = flat[byte * (whole // element) : (byte + 1) * (whole // element)]
    out[whole:] = flat[whole:]
    return memoryview(out)  # type: ignore[arg-type]
