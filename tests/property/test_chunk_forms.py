"""Every form gives the bytes back, opens nothing that is not exactly what was stored, and takes no more memory than was said."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import zstandard
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from edif_mesh.domain.ids import AttemptNumber, Digest, JobId, KeyId
from edif_mesh.errors import ChunkError, ManifestError
from edif_mesh.results.choice import FAST, OFF, Choice, LinkEstimate
from edif_mesh.results.chunks import AS_IS, checked
from edif_mesh.results.codec import PLANES_ZSTD, ZSTD, decode, encode, from_planes, to_planes
from edif_mesh.results.forms import ChunkForms, FormOpener, SharedChunks, Sharing
from edif_mesh.results.index import CHUNK_BYTES, Entry, Index
from edif_mesh.results.manifest import ManifestParts
from edif_mesh.results.sealing import Sealer
from edif_mesh.wire.messages import Lender
from tests.builders_transfer import a_manifest

JOB, ONE, ORDER = JobId("j0000000000000000000000a"), AttemptNumber(1), Digest("0" * 64)
KEY = X25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw().hex()


def entry_of(plain: bytes, form: int, element: int, stored: bytes | memoryview) -> Entry:
    return Entry(len(plain), len(stored), form, element, 0, 0, bytes(32))


def activations(count: int = 50_000) -> bytes:
    return (torch.randn(count, generator=torch.Generator().manual_seed(3)) * 0.02).numpy().tobytes()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([0, 1, 2, 3, 4, 8, 255]), st.sampled_from([0, 1, 9]))
def test_what_was_encoded_comes_back(data: bytes, element: int, level: int) -> None:
    data = data * 5
    form, stored = encode(data, element, level)
    assert bytes(decode(0, entry_of(data, form, element, stored), form, stored)) == data
    if element in (2, 4, 8):
        assert bytes(from_planes(to_planes(data, element), element)) == data


def test_activations_shrink_by_their_planes_and_noise_travels_as_it_is() -> None:
    data = activations()
    form, stored = encode(data, 4, 1)
    assert form == PLANES_ZSTD
    assert len(stored) < 0.93 * len(data)
    assert encode(random.Random(1).randbytes(100_000), 4, 1)[0] == AS_IS
    assert encode(bytes(100_000), 0, 1)[0] == ZSTD


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_chunk_is_refused_by_number_or_opens_to_no_more_than_was_said(data: st.DataObject) -> None:
    plain = activations(2000)
    form, packed = encode(plain, 4, 1)
    stored = bytearray(packed)
    for _ in range(data.draw(st.integers(1, 4))):
        stored[data.draw(st.integers(0, len(stored) - 1))] = data.draw(st.integers(0, 255))
    try:
        opened = decode(7, entry_of(plain, form, 4, stored), form, bytes(stored))
    except ChunkError as error:
        said = str(error)
    else:
        said = "Chunk 7" * (len(opened) == len(plain))
    assert "Chunk 7" in said


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"no frame",
        zstandard.ZstdCompressor().compress(bytes(1 << 30)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000)),
        zstandard.ZstdCompressor().compress(bytes(1000)) + b"x",
        zstandard.ZstdCompressor().compress(bytes(500)) + zstandard.ZstdCompressor().compress(bytes(500)),
        zstandard.ZstdCompressor().compress(bytes(1000))[:-1],
    ],
    ids=["nothing", "noise", "a bomb", "no size", "more behind it", "two frames", "cut short"],
)
def test_what_is_no_frame_of_exactly_the_stated_size_is_refused(stored: bytes) -> None:
    with pytest.raises(ChunkError, match="Chunk 3"):
        decode(3, entry_of(bytes(1000), ZSTD, 0, stored), ZSTD, stored)


@pytest.mark.parametrize(("form", "element"), [(3, 4), (PLANES_ZSTD, 3), (PLANES_ZSTD, 0), (0x40, 0)])
def test_an_unknown_form_is_refused(form: int, element: int) -> None:
    with pytest.raises(ChunkError, match="unknown form"):
        decode(3, entry_of(b"x", form, element, b"x"), form, b"x")


# ------------------------------------------------------------------------------------------------------------- sealed


def sealed(number: int = 0, plain: bytes = b"secret" * 1000) -> tuple[ChunkForms, Entry, memoryview]:
    forms = ChunkForms(Choice("fast", LinkEstimate()), sealer=Sealer(PUBLIC, ORDER, ONE))
    made = forms.make(number, [memoryview(plain)], 0)
    return forms, made.entry, memoryview(b"".join(made.stored))


def the_manifest(forms: ChunkForms, entry: Entry) -> object:
    return a_manifest(JOB, ONE, ManifestParts(Index([entry]), forms.lenders, forms.sealed_key))


def test_a_sealed_chunk_opens_for_its_researcher_only_and_shows_nothing() -> None:
    forms, entry, stored = sealed()
    manifest = the_manifest(forms, entry)
    assert bytes(checked(FormOpener(KEY), manifest, 0, entry, stored)) == b"secret" * 1000
    assert b"secret" not in bytes(stored)
    with pytest.raises(ManifestError, match="not sealed to your key"):
        FormOpener(X25519PrivateKey.generate()).open(manifest, 0, entry, stored)
    with pytest.raises(ChunkError, match="did not ask"):
        FormOpener(None).open(manifest, 0, entry, stored)


def test_a_sealed_chunk_opens_nowhere_but_in_its_place() -> None:
    forms, entry, stored = sealed(number=4)
    manifest = the_manifest(forms, entry)
    opener = FormOpener(KEY)
    flipped = bytearray(stored)
    flipped[5] ^= 1
    for wrong_entry, data in (
        (replace(entry, number=5), stored),
        (replace(entry, form=entry.form ^ ZSTD), stored),
        (entry, memoryview(flipped)),
        (entry, stored[:-1]),
        (entry, stored[:3]),
    ):
        with pytest.raises(ChunkError, match="not what its site has sealed"):
            opener.open(manifest, 4, wrong_entry, data)
    for change in (
        {"attempt": AttemptNumber(2)},
        {"order_digest": Digest("1" * 64)},
        {"sealed_key": "AAAA"},
        {"sealed_key": "?"},
    ):
        with pytest.raises(ManifestError, match="not sealed to your key"):
            FormOpener(KEY).open(replace(manifest, **change), 4, entry, stored)


def test_what_should_be_sealed_and_is_not_is_refused() -> None:
    made = ChunkForms(Choice("off", LinkEstimate())).make(0, [memoryview(b"plain")], 0)
    manifest = the_manifest(ChunkForms(Choice("off", LinkEstimate())), made.entry)
    with pytest.raises(ChunkError, match="not sealed, although"):
        FormOpener(KEY).open(manifest, 0, made.entry, memoryview(b"plain"))


@pytest.mark.parametrize("key", ["", "00", "zz" * 32, "00" * 32])
def test_an_order_that_names_no_key_to_seal_to_is_a_sentence(key: str) -> None:
    with pytest.raises(ManifestError, match="no X25519 key"):
        Sealer(key, ORDER, ONE)


# ------------------------------------------------------------------------------------------------------- used again


def a_result(
    shared: SharedChunks, owner: str, session: str, job: str, chunks: list[bytes], now_ms: int = 0
) -> list[Entry]:
    """Store a result and commit it; returns its entries."""
    forms = ChunkForms(Choice("fast", LinkEstimate()), sharing=Sharing(shared, KeyId(owner), session, lambda: now_ms))
    made = [forms.make(number, [memoryview(chunk)], 4) for number, chunk in enumerate(chunks)]
    for one in made:
        if one.stored:
            forms.stored(one, 0.0, 0)
    forms.committed(JobId(job), ONE)
    assert all(one.entry.lender <= len(forms.lenders) for one in made)
    return [one.entry for one in made]


def test_the_same_chunk_is_stored_once_for_one_key_and_session_and_never_for_others() -> None:
    shared, same, other = SharedChunks(keep_ms=1000), activations(), activations(60_000)
    first = a_result(shared, "ada", "s", "a", [same, b"small"])
    second = a_result(shared, "ada", "s", "b", [other, same, b"small"])
    assert [entry.lender for entry in first] == [0, 0]
    assert [entry.lender for entry in second] == [0, 1, 0]
    assert replace(second[1], lender=0) == first[0]
    third = a_result(shared, "ada", "s", "c", [same])
    assert (third[0].lender, third[0].number) == (1, 0)  # of the first, not of the second
    assert a_result(shared, "eve", "s", "d", [same])[0].lender == 0
    assert a_result(shared, "ada", "t", "e", [same])[0].lender == 0
    assert a_result(shared, "ada", "s", "f", [same], now_ms=2000)[0].lender == 0


def test_the_chunks_of_a_deleted_job_are_stored_anew() -> None:
    shared, same = SharedChunks(), activations()
    a_result(shared, "ada", "s", "a", [same])
    shared.drop(JobId("a"))
    assert a_result(shared, "ada", "s", "b", [same])[0].lender == 0


def test_what_was_not_committed_lends_nothing() -> None:
    shared, same = SharedChunks(), activations()
    forms = ChunkForms(Choice("off", LinkEstimate()), sharing=Sharing(shared, KeyId("ada"), "s", lambda: 0))
    forms.stored(forms.make(0, [memoryview(same)], 4), 0.0, 0)
    assert a_result(shared, "ada", "s", "b", [same])[0].lender == 0


def test_the_shared_chunks_are_bounded() -> None:
    shared = SharedChunks(most=10)
    for number in range(30):
        entry = Entry(1, 1, 0, 0, 0, 0, bytes(32))
        shared.add(KeyId("k"), "s", Lender(JobId("a"), ONE), {bytes([number]) * 32: entry}, 0)
    assert sum(shared.find(KeyId("k"), "s", bytes([n]) * 32, 1) is not None for n in range(30)) == 10


# ------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("mbit", "ratio", "wanted"),
    [
        (10, 0.85, FAST),
        (100, 0.85, FAST),
        (100, 0.99, OFF),
        (10_000, 0.85, OFF),
        (10_000, 0.1, OFF),
        (1_000, 0.4, FAST),
    ],
)
def test_auto_compresses_where_the_link_is_slower_than_the_gain(mbit: int, ratio: float, wanted: int) -> None:
    choice = Choice("auto", LinkEstimate(bytes_per_s=mbit * 125_000))
    assert choice.level(4) == FAST  # nothing is known yet
    choice.learn(4, CHUNK_BYTES, int(ratio * CHUNK_BYTES), CHUNK_BYTES / 500e6)
    assert choice.level(4) == wanted


def test_the_slower_of_both_links_decides() -> None:
    choice = Choice("auto", LinkEstimate(bytes_per_s=1e10), client_bytes_per_s=10_000_000)
    choice.learn(4, CHUNK_BYTES, int(0.85 * CHUNK_BYTES), 0.002)
    assert choice.level(4) == FAST


def test_noise_is_left_alone_and_looked_at_again_now_and_then() -> None:
    choice = Choice("auto", LinkEstimate(bytes_per_s=1e6))
    choice.learn(4, CHUNK_BYTES, CHUNK_BYTES, 0.002)
    levels = [choice.level(4) for _ in range(200)]
    assert levels.count(FAST) in (2, 3)
    choice.learn(4, CHUNK_BYTES, CHUNK_BYTES // 10, 0.002)
    assert choice.level(4) == FAST


@pytest.mark.parametrize(("setting", "level"), [("off", 0), ("fast", 1), ("best", 9)])
def test_a_fixed_setting_is_kept(setting: str, level: int) -> None:
    choice = Choice(setting, LinkEstimate())
    choice.learn(4, CHUNK_BYTES, CHUNK_BYTES, 0.002)
    assert choice.level(4) == level


def test_a_link_is_measured_while_it_is_busy_and_not_while_it_rests() -> None:
    link = LinkEstimate()
    now = 0.0
    for in_flight in (3, 3, 3, 0):
        now += 0.1
        link.acknowledged(1 << 20, now, in_flight)
    assert link.bytes_per_s == pytest.approx((1 << 20) / 0.1)
    link.acknowledged(1 << 20, now + 100, 3)
    assert link.bytes_per_s == pytest.approx((1 << 20) / 0.1)


def test_on_a_fast_link_only_one_chunk_is_tried_before_anything_is_known() -> None:
    choice = Choice("auto", LinkEstimate(bytes_per_s=200e6))
    assert [choice.level(4) for _ in range(20)] == [FAST] + [OFF] * 19
    assert choice.level(2) == FAST
    choice.learn(4, 1000, 900, 0.001)  # too small to say anything
    assert [choice.level(4) for _ in range(3)] == [FAST, OFF, OFF]


def test_a_link_that_was_fed_slowly_is_soon_known_to_be_fast_again() -> None:
    link = LinkEstimate(bytes_per_s=10e6)
    for number in range(4):
        link.acknowledged(20 << 20, number / 10, 3)
    assert link.bytes_per_s > 0.9 * (20 << 20) / 0.1
