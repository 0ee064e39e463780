"""Signed envelopes (DSSE): the signature covers the exact bytes sent; verify first, then parse those bytes once.

An envelope is the JSON `{"payload": base64, "payloadType": type, "signatures": [{"keyid": id, "sig": base64}]}` with
exactly one signature. What is signed is `DSSEv1 SP len(type) SP type SP len(body) SP body`
(Dead Simple Signing Envelope, protocol.md of secure-systems-lab/dsse).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from edif_mesh.domain.ids import Digest, KeyId
from edif_mesh.errors import BadSignatureError, StaleEnvelopeError, VersionError, WireError, WrongRoleError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import Identity, TrustStore
from edif_mesh.wire.codec import decode, encode, load_json
from edif_mesh.wire.messages import SIGNED_BY, Message
from edif_mesh.wire.version import payload_type

MAX_SKEW_MS = 60_000
"""How far `issued_at_ms` of a request may be from the receiver's clock."""

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Opened(Generic[M]):
    """A verified message, who signed it, and the SHA-256 of the exact envelope bytes."""

    message: M
    key: KeyId
    identity: Identity
    digest: Digest


def seal(message: Message, key: PrivateKey) -> str:
    """Return the envelope (JSON text) of `message`, signed with `key`."""
    body, kind = encode(message), payload_type(message.kind)
    return json.dumps(
        {
            "payload": base64.b64encode(body).decode(),
            "payloadType": kind,
            "signatures": [{"keyid": key.id, "sig": base64.b64encode(key.sign(_signed_bytes(kind, body))).decode()}],
        },
        separators=(",", ":"),
    )


def open_envelope(
    raw: bytes | str, expected: type[M], trust: TrustStore, now_ms: int, *, fresh: bool = False
) -> Opened[M]:
    """Verify `raw` (exactly as received) and return its message, which must be an `expected`, and its proven signer.

    With `fresh` the message must have been issued within `MAX_SKEW_MS` of `now_ms` (Unix, UTC).

    Raises:
        WireError: no envelope, not one signature, not the expected kind; VersionError for another protocol version.
        UnknownKeyError, RevokedKeyError, StaleEnvelopeError: the signer must not be believed (now).
        BadSignatureError: the signature does not fit these bytes.
        WrongRoleError: the signer may not sign this kind of message.
    """
    text = raw if isinstance(raw, str) else _utf8(raw)
    kind, body, key, signature = _parts(text)
    wanted = expected.__dataclass_fields__["kind"].default  # type: ignore[attr-defined]
    if kind != payload_type(wanted):
        _refuse_type(kind, wanted)
    identity, public = trust.believe(key, now_ms)
    if not public.verify(signature, _signed_bytes(kind, body)):
        raise BadSignatureError(f"The signature of {identity.name} does not fit this {wanted}: its bytes were changed.")
    if identity.role not in SIGNED_BY[wanted]:
        raise WrongRoleError(f"{identity.name} is enrolled as {identity.role} and may not sign a {wanted}.")
    message = decode(body)
    if not isinstance(message, expected):
        raise WireError(f"The body of this {wanted} says that it is a {message.kind}.")
    if fresh:
        issued = cast(int, getattr(message, "issued_at_ms", 0))
        if abs(now_ms - issued) > MAX_SKEW_MS:
            raise StaleEnvelopeError(
                f"This {wanted} of {identity.name} was issued {abs(now_ms - issued) // 1000} s away from the time "
                f"here; {MAX_SKEW_MS // 1000} s are allowed. Check both clocks."
            )
    return Opened(message, key, identity, envelope_digest(text))


def kind_of(raw: bytes | str) -> str:
    """Return the kind that an envelope says it carries (unproven); raises WireError. Used to choose what to expect."""
    kind = _parts(raw if isinstance(raw, str) else _utf8(raw))[0]
    return kind.removeprefix("application/vnd.edif.").partition(".")[0]


def body_of(envelope: str) -> bytes:
    """Return the body of an envelope of our own making, unverified; raises WireError."""
    return _parts(envelope)[1]


def envelope_digest(text: str) -> Digest:
    """Return the SHA-256 of an envelope's exact bytes: the name of an order in grants, reports and manifests."""
    return Digest(hashlib.sha256(text.encode()).hexdigest())


def _signed_bytes(kind: str, body: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(body), body)


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WireError("This is no envelope: it is not UTF-8.") from error


def _parts(text: str) -> tuple[str, bytes, KeyId, bytes]:
    value = load_json(text)
    if not isinstance(value, dict) or set(value) != {"payload", "payloadType", "signatures"}:
        raise WireError("This is no envelope: it must have payload, payloadType and signatures, and nothing else.")
    signatures = value["signatures"]
    if not (isinstance(signatures, list) and len(signatures) == 1 and isinstance(signatures[0], dict)):
        raise WireError("An envelope has exactly one signature.")
    fields = (value["payloadType"], value["payload"], signatures[0].get("keyid"), signatures[0].get("sig"))
    if len(signatures[0]) != 2 or not all(isinstance(item, str) for item in fields):
        raise WireError("This is no envelope: a field has the wrong type.")
    kind, payload, key, signature = cast(tuple[str, str, str, str], fields)
    return kind, _base64(payload), KeyId(key), _base64(signature)


def _base64(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError("This is no envelope: bad base64.") from error
    if (
        base64.b64encode(data).decode() != text
    ):  # unused bits of the last letter: one order must have one text, one digest
        raise WireError("This is no envelope: its base64 is not in the one form that there is.")
    return data


def _refuse_type(kind: str, wanted: str) -> None:
    if kind.startswith(f"application/vnd.edif.{wanted}.v"):
        raise VersionError(
            f"The peer speaks another protocol version ({kind[-12:]!r}); this side wants {payload_type(wanted)}."
        )
    raise WireError(f"Expected a signed {wanted}, got {kind[:60]!r}.")
