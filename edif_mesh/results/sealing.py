"""Chunks that only their researcher can open: AES-256-GCM under a key that is sealed (HPKE, RFC 9180) to the researcher's.

The broker and the coordinator see lengths, ciphertext and its SHA-256. Every chunk is bound to its order, attempt, number
and form: in another place it does not open.
"""

from __future__ import annotations

import base64
import binascii
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from edif_mesh.domain.ids import AttemptNumber, Digest
from edif_mesh.errors import ChunkError, ManifestError

SEALED = 0x80
"""Set in the form of a sealed chunk."""
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_KEY_BYTES = 32


class Sealer:
    """The site's side, for one attempt."""

    def __init__(self, seal_to: str, order: Digest, attempt: AttemptNumber) -> None:
        """`seal_to` as in `ResultOptions`; raises ManifestError when it is no key."""
        self._order, self._attempt = order, attempt
        key = secrets.token_bytes(_KEY_BYTES)
        try:
            public = X25519PublicKey.from_public_bytes(bytes.fromhex(seal_to))
            self.sealed_key = base64.b64encode(_SUITE.encrypt(key, public, _info(order, attempt))).decode()
        except ValueError as error:
            raise ManifestError(
                f"The order wants its result sealed to {seal_to[:70]!r}, which is no X25519 key."
            ) from error
        self._cipher = AESGCM(key)

    def seal(self, number: int, form: int, data: bytes | memoryview) -> bytes:
        """Return a chunk's ciphertext; 16 bytes longer."""
        return self._cipher.encrypt(_nonce(number), data, _bound(self._order, self._attempt, number, form))


class Unsealer:
    """The researcher's side, for one attempt."""

    def __init__(self, private: X25519PrivateKey, sealed_key: str, order: Digest, attempt: AttemptNumber) -> None:
        """Raises ManifestError when `sealed_key` was not sealed to this key for this order and attempt."""
        self._order, self._attempt = order, attempt
        try:
            key = _SUITE.decrypt(base64.b64decode(sealed_key, validate=True), private, _info(order, attempt))
            self._cipher = AESGCM(key)
        except (InvalidTag, ValueError, binascii.Error) as error:
            raise ManifestError("The result is not sealed to your key; it cannot be opened here.") from error

    def open(self, number: int, form: int, data: bytes | memoryview) -> bytes:
        """Return a chunk's plaintext; raises ChunkError when it is not exactly what the site sealed as this chunk."""
        try:
            return self._cipher.decrypt(_nonce(number), data, _bound(self._order, self._attempt, number, form))
        except InvalidTag as error:
            raise ChunkError(f"Chunk {number} is not what its site has sealed; it was not accepted.") from error


def _nonce(number: int) -> bytes:
    """A key seals one attempt, and each number once."""
    return number.to_bytes(12, "big")


def _info(order: Digest, attempt: AttemptNumber) -> bytes:
    return f"edif result key v1 {order} {attempt}".encode()


def _bound(order: Digest, attempt: AttemptNumber, number: int, form: int) -> bytes:
    return f"edif result chunk v1 {order} {attempt} {number} {form}".encode()
