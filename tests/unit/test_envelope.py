"""Envelopes: exact bytes in, verified message out; every altered byte is refused."""

import json
from pathlib import Path

import pytest

from edif_mesh.domain.ids import Digest, FederationId, JobId, KeyId
from edif_mesh.domain.site import ModelRef, Versions
from edif_mesh.errors import (
    BadSignatureError,
    EdifError,
    RevokedKeyError,
    StaleEnvelopeError,
    TrustError,
    UnknownKeyError,
    WireError,
    WrongRoleError,
)
from edif_mesh.identity.keys import PrivateKey, PublicKey
from edif_mesh.identity.trust import Identity, TrustStore
from edif_mesh.wire.envelope import open_envelope, seal
from edif_mesh.wire.messages import CancelJob, Order, PayloadRef, Role

NOW = 1_700_000_000_000


def an_order() -> Order:
    return Order(
        federation=FederationId("test"),
        job=JobId("j" + "0" * 23),
        nonce="n",
        issued_at_ms=NOW,
        not_before_ms=NOW,
        expires_at_ms=NOW + 1000,
        payload=PayloadRef(Digest("0" * 64), 3),
        model=ModelRef("openai-community/gpt2"),
        client=Versions(),
    )


@pytest.fixture
def key() -> PrivateKey:
    return PrivateKey.generate()


@pytest.fixture
def trust(key: PrivateKey) -> TrustStore:
    return TrustStore(FederationId("test"), (Identity(key.public.hex(), Role.RESEARCHER, "ada@example.org"),))


def test_a_sealed_order_opens_as_what_it_was(key: PrivateKey, trust: TrustStore) -> None:
    opened = open_envelope(seal(an_order(), key), Order, trust, NOW)
    assert opened.message == an_order()
    assert (opened.key, opened.identity.name) == (key.id, "ada@example.org")


def test_every_changed_byte_is_refused(key: PrivateKey, trust: TrustStore) -> None:
    raw = seal(an_order(), key).encode()
    for place in range(len(raw)):
        for bit in (0x01, 0x20):
            forged = raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :]
            with pytest.raises((WireError, TrustError)):
                open_envelope(forged, Order, trust, NOW)


def test_a_stranger_s_order_is_refused(trust: TrustStore) -> None:
    with pytest.raises(UnknownKeyError):
        open_envelope(seal(an_order(), PrivateKey.generate()), Order, trust, NOW)


def test_a_revoked_key_is_refused(key: PrivateKey, trust: TrustStore) -> None:
    trust.revoke(key.id, NOW)
    with pytest.raises(RevokedKeyError):
        open_envelope(seal(an_order(), key), Order, trust, NOW)


def test_a_site_may_not_sign_orders(key: PrivateKey) -> None:
    trust = TrustStore(FederationId("test"), (Identity(key.public.hex(), Role.SITE, "ansbach"),))
    with pytest.raises(WrongRoleError):
        open_envelope(seal(an_order(), key), Order, trust, NOW)


def test_one_kind_does_not_pass_for_another(key: PrivateKey, trust: TrustStore) -> None:
    with pytest.raises(WireError):
        open_envelope(seal(an_order(), key), CancelJob, trust, NOW)


def test_a_relabelled_body_is_refused(key: PrivateKey, trust: TrustStore) -> None:
    envelope = json.loads(seal(an_order(), key))
    envelope["payloadType"] = envelope["payloadType"].replace("order", "cancel_job")
    with pytest.raises(BadSignatureError):
        open_envelope(json.dumps(envelope), CancelJob, trust, NOW)


def test_a_second_signature_is_refused(key: PrivateKey, trust: TrustStore) -> None:
    envelope = json.loads(seal(an_order(), key))
    envelope["signatures"] *= 2
    with pytest.raises(WireError):
        open_envelope(json.dumps(envelope), Order, trust, NOW)


@pytest.mark.parametrize("late_ms", [-60_001, 60_001])
def test_a_request_from_another_time_is_refused(key: PrivateKey, trust: TrustStore, late_ms: int) -> None:
    text = seal(CancelJob(JobId("j" + "0" * 23), issued_at_ms=NOW), key)
    assert open_envelope(text, CancelJob, trust, NOW, fresh=True)
    with pytest.raises(StaleEnvelopeError):
        open_envelope(text, CancelJob, trust, NOW + late_ms, fresh=True)


LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "0000000000000000000000000000000000000000000000000000000000000080",
]


@pytest.mark.parametrize("text", LOW_ORDER)
def test_low_order_keys_are_refused(text: str) -> None:
    with pytest.raises(TrustError):
        PublicKey.from_hex(text)


def test_a_private_key_file_others_can_read_is_refused(key: PrivateKey, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    key.save(path)
    assert PrivateKey.load(path).id == key.id
    path.chmod(0o644)
    with pytest.raises(EdifError, match="chmod 600"):
        PrivateKey.load(path)


def test_a_changed_trust_store_is_seen_at_the_next_refresh(key: PrivateKey, tmp_path: Path) -> None:
    path = tmp_path / "trust.json"
    writer = TrustStore(FederationId("test"), (), path)
    writer.enrol(Identity(key.public.hex(), Role.RESEARCHER, "ada"))
    reader = TrustStore.load(path)
    assert reader.believe(KeyId(key.id), NOW)[0].name == "ada"
    writer.revoke(key.id, NOW)
    reader.refresh()
    with pytest.raises(RevokedKeyError):
        reader.believe(key.id, NOW)
