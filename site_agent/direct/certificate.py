"""The endpoint's own certificate: made once, believed for its digest alone, which the site signs in every manifest."""

from __future__ import annotations

import datetime
import hashlib
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from edif_mesh.domain.ids import SiteId
from edif_mesh.errors import ConfigError

_VALID = datetime.timedelta(days=3650)


def certificate(path: Path, site: SiteId) -> str:
    """Return the SHA-256 of the certificate in `path` (key and certificate, PEM, mode 600), which is made when missing.

    Raises ConfigError that names the file.
    """
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _make(path, site)
        return _digest(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The endpoint's certificate {path} is unusable ({error}); remove it, it is made anew."
        ) from error


def _digest(pem: bytes) -> str:
    der = x509.load_pem_x509_certificate(pem[pem.index(b"-----BEGIN CERTIFICATE-----") :]).public_bytes(Encoding.DER)
    return hashlib.sha256(der).hexdigest()


def _make(path: Path, site: SiteId) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{site}.edif")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + _VALID)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + made.public_bytes(Encoding.PEM)
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
