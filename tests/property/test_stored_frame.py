"""The zstd frame that the gateway writes is one that any zstd reads."""

from __future__ import annotations

import io

import zstandard
from hypothesis import given
from hypothesis import strategies as st

from edif_mesh.results.stored_frame import BLOCK_BYTES, StoredFrame

_SIZES = st.sampled_from([0, 1, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES, 300_000])


@given(st.lists(_SIZES, max_size=6), st.binary(max_size=3))
def test_it_is_one_frame_that_declares_its_size_and_holds_what_was_written(sizes: list[int], before: bytes) -> None:
    out, pieces = io.BytesIO(before), [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    out.seek(len(before))
    with StoredFrame(out) as frame:
        for piece in pieces:
            frame.write(memoryview(piece))
    written, wanted = out.getvalue(), b"".join(pieces)
    assert written[: len(before)] == before
    blob = written[len(before) :]
    assert out.tell() == len(written)
    assert zstandard.frame_content_size(blob) == len(wanted)
    assert zstandard.ZstdDecompressor().decompress(blob) == wanted
    streamed = zstandard.ZstdDecompressor().decompressobj()
    assert streamed.decompress(blob) == wanted
    assert streamed.unused_data == b""
