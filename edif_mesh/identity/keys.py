"""Ed25519 keys: make, store, sign, verify. One algorithm, fixed; low-order public keys are refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from edif_mesh.domain.ids import KeyId
from edif_mesh.errors import ConfigError, TrustError

PUBLIC_KEY_BYTES = 32
_P = 2**255 - 19
# The y coordinates of the eight points of low order (RFC 7748 section 7 and RFC 8032 section 5.1): for such a "key" one
# signature fits every message, and the library accepts them.
_Y8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_LOW_ORDER_Y = frozenset({0, 1, _P - 1, _Y8, _P - _Y8})


class PublicKey:
    """An Ed25519 public key that is not of low order; `id` is its short name."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) != PUBLIC_KEY_BYTES:
            raise TrustError(f"A public key has {PUBLIC_KEY_BYTES} bytes, not {len(raw)}.")
        y = int.from_bytes(raw, "little") & ((1 << 255) - 1)
        if y >= _P or y in _LOW_ORDER_Y:
            raise TrustError("This public key is of low order or not canonical: anybody could sign for it.")
        self.raw = raw
        self.id = KeyId(hashlib.sha256(raw).hexdigest()[:32])
        self._key = Ed25519PublicKey.from_public_bytes(raw)

    @classmethod
    def from_hex(cls, text: str) -> PublicKey:
        """Return the key in `text` (64 hex digits); raises TrustError."""
        try:
            raw = bytes.fromhex(text)
        except ValueError as error:
            raise TrustError(f"A public key is 64 hex digits, not {text[:70]!r}.") from error
        return cls(raw)

    def hex(self) -> str:
        """Return the key as 64 hex digits."""
        return self.raw.hex()

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Return whether `signature` (64 bytes) was made over `message` with this key's private half."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


class PrivateKey:
    """An Ed25519 private key; never printed, never pickled."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())
        self.id = self.public.id

    @classmethod
    def generate(cls) -> PrivateKey:
        """Return a new random key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> PrivateKey:
        """Read a key file (PEM, PKCS 8); raises ConfigError that names the file."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"The key file {path} cannot be read: {error.strerror}.") from error
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"The key file {path} can be read by others. Type: chmod 600 {path}")
        try:
            key = load_pem_private_key(data, password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"The key file {path} holds no usable key: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"The key file {path} holds another kind of key; Ed25519 is needed.")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key file with mode 600; an existing file is never overwritten (FileExistsError)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        pem = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature over `message`."""
        return self._key.sign(message)

    def sealing_key(self, purpose: str) -> X25519PrivateKey:
        """Return the key to which a result is sealed; the same for the same `purpose`, wherever this key is."""
        seed = HKDF(SHA256(), 32, salt=None, info=f"edif sealing key v1 {purpose}".encode())
        return X25519PrivateKey.from_private_bytes(seed.derive(self._key.private_bytes_raw()))

    def __repr__(self) -> str:
        return f"PrivateKey(id={self.id})"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a private key is not for pickling")
