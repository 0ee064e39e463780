"""The trust store: which keys this party believes, in which role. Each party keeps its own; local deny always wins."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from edif_mesh.domain.ids import FederationId, KeyId
from edif_mesh.errors import ConfigError, RevokedKeyError, StaleEnvelopeError, TrustError, UnknownKeyError
from edif_mesh.identity.keys import PublicKey
from edif_mesh.wire.messages import Role


@dataclass(frozen=True, slots=True)
class Identity:
    """One enrolled key. `name` is a site id for sites, an address for people; `models` empty means any model."""

    public_key: str
    role: Role
    name: str
    organisation: str = ""
    not_before_ms: int = 0
    not_after_ms: int | None = None
    revoked_at_ms: int | None = None
    models: tuple[str, ...] = ()

    @property
    def key(self) -> KeyId:
        """The id of the key."""
        return PublicKey.from_hex(self.public_key).id


@dataclass(frozen=True, slots=True)
class _File:
    federation: FederationId
    identities: tuple[Identity, ...]
    format: int = 1


_ADAPTER = TypeAdapter(_File)


class TrustStore:
    """Enrolled identities by key id, kept in one JSON file; re-read when the file has changed."""

    def __init__(
        self, federation: FederationId, identities: tuple[Identity, ...] = (), path: Path | None = None
    ) -> None:
        self.federation = federation
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._set(identities)

    @classmethod
    def load(cls, path: Path) -> TrustStore:
        """Read the store at `path`; raises ConfigError."""
        store = cls(FederationId(""), (), path)
        store.refresh()
        return store

    def refresh(self) -> None:
        """Read the file again when it has changed; a broken file keeps the old content and raises ConfigError."""
        if self.path is None:
            return
        try:
            info = self.path.stat()
            stamp = (info.st_mtime_ns, info.st_size)
            if stamp == self._stamp:
                return
            file = _ADAPTER.validate_json(self.path.read_bytes(), strict=True)
        except OSError as error:
            raise ConfigError(f"The trust store {self.path} cannot be read: {error.strerror}.") from error
        except ValidationError as error:
            raise ConfigError(f"The trust store {self.path} is damaged: {error.errors()[0]['msg']}.") from error
        try:
            self._set(file.identities)
        except TrustError as error:
            raise ConfigError(f"The trust store {self.path} holds a bad key: {error}") from error
        self.federation, self._stamp = file.federation, stamp

    def believe(self, key: KeyId, now_ms: int) -> tuple[Identity, PublicKey]:
        """Return who owns `key` and the key itself.

        Raises:
            UnknownKeyError: nobody enrolled owns it.
            RevokedKeyError: it was revoked.
            StaleEnvelopeError: its time of validity has not begun or has ended.
        """
        found = self._by_id.get(key)
        if found is None:
            raise UnknownKeyError(f"No enrolled identity owns the key {key}.")
        identity, public = found
        if identity.revoked_at_ms is not None:
            raise RevokedKeyError(f"The key {key} of {identity.name} was revoked.")
        if now_ms < identity.not_before_ms or (identity.not_after_ms is not None and now_ms >= identity.not_after_ms):
            raise StaleEnvelopeError(f"The key {key} of {identity.name} is not valid at this time.")
        return identity, public

    def identities(self) -> tuple[Identity, ...]:
        """Return all enrolled identities, revoked ones too."""
        return tuple(identity for identity, _ in self._by_id.values())

    def enrol(self, identity: Identity) -> None:
        """Add or replace an identity and save. Raises TrustError for a low-order key."""
        public = PublicKey.from_hex(identity.public_key)
        self._by_id[public.id] = (identity, public)
        self._save()

    def revoke(self, key: KeyId, now_ms: int) -> None:
        """Mark a key revoked and save; raises UnknownKeyError."""
        if key not in self._by_id:
            raise UnknownKeyError(f"No enrolled identity owns the key {key}.")
        identity, public = self._by_id[key]
        self._by_id[key] = (replace(identity, revoked_at_ms=now_ms), public)
        self._save()

    def _set(self, identities: tuple[Identity, ...]) -> None:
        keys = [(identity, PublicKey.from_hex(identity.public_key)) for identity in identities]
        self._by_id = {public.id: (identity, public) for identity, public in keys}

    def _save(self) -> None:
        if self.path is None:
            return
        data = json.dumps(_ADAPTER.dump_python(_File(self.federation, self.identities()), mode="json"), indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
        with open(handle, "w") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, self.path)
