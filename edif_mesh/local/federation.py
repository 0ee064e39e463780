"""The files of a local federation: keys, trust stores and settings of every party, made once and then kept.

    HOME/client.toml                 the researcher: key, trust store, outbox/
    HOME/coordinator/                coordinator.toml, key.pem, trust.json, coordinator.db
    HOME/sites/NAME/                 site.toml, key.pem, trust.json, journal.db
    HOME/nats/                       nats.conf, jetstream/
    HOME/logs/                       one file a process
    HOME/mesh.json                   what runs now: addresses and process ids

Each party has its own key and its own trust store, as at separate institutions; only the folder is shared.
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from edif_mesh.domain.ids import FederationId, SiteId
from edif_mesh.errors import ConfigError, EdifError
from edif_mesh.identity.keys import PrivateKey
from edif_mesh.identity.trust import Identity, TrustStore
from edif_mesh.models import ResolvedModel
from edif_mesh.transport.embedded import free_port
from edif_mesh.wire.messages import Role

FEDERATION = FederationId("local")
SITE_NAMES = ("ansbach", "heilbronn")
_KEEP_BYTES, _KEEP_HOURS = 8 << 30, 12
"""What a local site keeps of its results, beside the broker's copy on the same disk."""
_ROLES = ("coordinator", "site", "client", "system")


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """What `edif up` was asked for."""

    home: Path
    sites: int = 2
    models: tuple[ResolvedModel, ...] = ()
    gateway_port: int = 8001
    monitor_port: int = 8002
    slots: int = 2
    ready_children: int = 2
    lease_ms: int = 30_000
    advert_ms: int = 5_000
    sandbox: str = "auto"


@dataclass(frozen=True, slots=True)
class LocalFederation:
    """Where everything of a prepared federation is."""

    settings: LocalSettings
    broker_port: int
    passwords: dict[str, str]
    sites: tuple[SiteId, ...]

    @property
    def home(self) -> Path:
        """The folder of all of it."""
        return self.settings.home

    @property
    def client_toml(self) -> Path:
        """The researcher's settings."""
        return self.home / "client.toml"

    @property
    def coordinator_toml(self) -> Path:
        """The coordinator's settings."""
        return self.home / "coordinator" / "coordinator.toml"

    def site_toml(self, site: SiteId) -> Path:
        """A site's settings."""
        return self.home / "sites" / site / "site.toml"

    def log(self, name: str) -> Path:
        """A process's log file."""
        return self.home / "logs" / f"{name}.log"


def prepare(settings: LocalSettings) -> LocalFederation:
    """Make or complete the files under `settings.home`; keys that are there stay. Raises ConfigError."""
    home = settings.home
    try:
        for folder in (home, home / "logs", home / "coordinator", home / "sites", home / "secrets"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        names = site_names(settings.sites)
        federation = LocalFederation(settings, _kept_port(home / "nats-port"), _passwords(home), names)
        _keys_and_trust(federation)
        _write_settings(federation)
    except OSError as error:
        raise ConfigError(f"The state folder {home} cannot be written: {error.strerror or error}.") from error
    return federation


def site_names(count: int) -> tuple[SiteId, ...]:
    """Return the names of `count` local sites."""
    return tuple(SiteId(SITE_NAMES[n] if n < len(SITE_NAMES) else f"site-{n + 1}") for n in range(count))


def _kept_port(file: Path) -> int:
    """Keep the port of the last start while it is free: clients that wait will find it again."""
    try:
        port = int(file.read_text())
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except (OSError, ValueError):
        port = free_port()
        file.write_text(str(port))
    return port


def _passwords(home: Path) -> dict[str, str]:
    found = {}
    for role in _ROLES:
        file = home / "secrets" / f"{role}.password"
        if not file.exists():
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
                handle.write(secrets.token_urlsafe(24))
        found[role] = file.read_text().strip()
    return found


def _keys_and_trust(federation: LocalFederation) -> None:
    home = federation.home
    researcher = _key(home / "keys" / "researcher.pem")
    coordinator = _key(home / "coordinator" / "key.pem")
    sites = {site: _key(home / "sites" / site / "key.pem") for site in federation.sites}
    people = Identity(researcher.public.hex(), Role.RESEARCHER, f"{getpass.getuser()}@local", "local")
    hub = Identity(coordinator.public.hex(), Role.COORDINATOR, "coordinator", "local")
    partners = [Identity(key.public.hex(), Role.SITE, site, site) for site, key in sites.items()]
    _enrol(home / "trust.json", (people, hub, *partners))
    _enrol(home / "coordinator" / "trust.json", (people, hub, *partners))
    for site, own in zip(federation.sites, partners, strict=True):
        _enrol(home / "sites" / site / "trust.json", (people, hub, own))


def _key(path: Path) -> PrivateKey:
    if not path.exists():
        PrivateKey.generate().save(path)
    return PrivateKey.load(path)


def _enrol(path: Path, identities: tuple[Identity, ...]) -> None:
    """Add who is missing. Who is there stays as is: a revocation made by hand must survive the next start."""
    try:
        store = TrustStore.load(path) if path.exists() else TrustStore(FEDERATION, (), path)
    except EdifError as error:
        raise ConfigError(f"{error} Remove it, and it is made anew.") from error
    known = {identity.public_key for identity in store.identities()}
    for identity in identities:
        if identity.public_key not in known:
            store.enrol(identity)


def _write_settings(federation: LocalFederation) -> None:
    home, settings = federation.home, federation.settings
    _write(
        federation.client_toml,
        f"""{_head("key_file = 'keys/researcher.pem'")}
outbox_dir = 'outbox'
gateway_port = {settings.gateway_port}
monitor_url = 'http://127.0.0.1:{settings.monitor_port}'
{_broker(federation, "client", "secrets")}""",
    )
    _write(
        federation.coordinator_toml,
        f"""{_head("key_file = 'key.pem'")}
database_url = {json.dumps(f"sqlite:///{home / 'coordinator' / 'coordinator.db'}")}
http_port = {settings.monitor_port}
system_user = 'system'
system_password_file = '../secrets/system.password'
{_broker(federation, "coordinator", "../secrets")}
[policy]
lease_ms = {settings.lease_ms}
suspect_ms = {settings.lease_ms // 2}
""",
    )
    for site in federation.sites:
        models = "".join(
            f"\n[[models]]\nrepo_id = {json.dumps(m.repo_id)}\n"
            + (f"path = {json.dumps(str(m.path))}\n" if not _in_cache(m) else f"revision = {json.dumps(m.revision)}\n")
            for m in settings.models
        )
        cache = next((_cache_of(m) for m in settings.models if _in_cache(m)), None)
        _write(
            federation.site_toml(site),
            f"""{_head("key_file = 'key.pem'")}
site = '{site}'
state_dir = '.'
country = 'DE'
slots = {settings.slots}
ready_children = {settings.ready_children}
advert_ms = {settings.advert_ms}
sandbox = {json.dumps(settings.sandbox)}
{f"hf_cache = {json.dumps(str(cache))}" if cache else ""}
{_broker(federation, "site", "../../secrets")}
{_direct(home / "sites" / site)}
{models}""",
        )


def _head(key: str) -> str:
    return f"# Written by `edif up`; changes are overwritten at its next start.\nfederation = '{FEDERATION}'\n{key}\ntrust_file = 'trust.json'"


def _broker(federation: LocalFederation, role: str, folder: str) -> str:
    return (
        f"\n[broker]\nurl = 'nats://127.0.0.1:{federation.broker_port}'\nuser = '{role}'\n"
        f"password_file = '{folder}/{role}.password'\n"
    )


def _direct(folder: Path) -> str:
    port = _kept_port(folder / "direct-port")
    return (
        f"[direct]\nurl = 'https://127.0.0.1:{port}'\nhost = '127.0.0.1'\nport = {port}\n"
        f"keep_bytes = {_KEEP_BYTES}\nkeep_hours = {_KEEP_HOURS}\n"
    )


def _in_cache(model: ResolvedModel) -> bool:
    return model.path.parent.name == "snapshots"


def _cache_of(model: ResolvedModel) -> Path:
    return model.path.parent.parent.parent


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)
