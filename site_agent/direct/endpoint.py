"""The endpoint: a process of its own that answers requests for kept results over TLS 1.3, a thread a connection.

It holds no key of the site, only the certificate's. Each request carries a `FetchResult` that the order's owner has signed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import logging
import socket
import ssl
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path

from edif_mesh.domain.ids import AttemptNumber, JobId, SiteId
from edif_mesh.errors import ConfigError, EdifError, NotFoundError, TrustError, WireError
from edif_mesh.identity.trust import TrustStore
from edif_mesh.wire.envelope import open_envelope
from edif_mesh.wire.messages import FetchResult
from site_agent.direct.kept import KeptResult, index_file
from site_agent.direct.requests import MAX_HEAD_BYTES, Asked, RangeError, answer_head, parse_head, refusal
from site_agent.runner.process import die_with_parent, harden_parent

log = logging.getLogger("edif.site.direct")

CONNECTIONS, CONNECTIONS_AN_ADDRESS = 64, 16
FAILURES_AN_ADDRESS, _FAILURES_S = 20, 60.0
"""So many requests of an address that prove nothing are answered in so many seconds."""
_HANDSHAKE_S, _IDLE_S, _SEND_S = 5.0, 30.0, 30.0
_PIECE_BYTES = 1 << 20
"""So much must be taken within `_SEND_S`."""


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """What the process is started with, as JSON in its first argument."""

    site: str
    host: str
    port: int
    certificate: str
    """A file with key and certificate."""
    trust_file: str
    folder: str
    """Where the kept results are."""

    def text(self) -> str:
        """Return the argument."""
        return json.dumps(asdict(self))


class Endpoint:
    """Listens and answers until the process ends."""

    def __init__(self, settings: EndpointSettings) -> None:
        """Bind the address. Raises OSError, ConfigError."""
        self._site, self._folder = SiteId(settings.site), Path(settings.folder)
        self._trust, self._trusting = TrustStore.load(Path(settings.trust_file)), threading.Lock()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.load_cert_chain(settings.certificate)
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        self._listening = socket.create_server((settings.host, settings.port), family=family, backlog=64)
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()
        self._failures: dict[str, deque[float]] = {}

    def serve(self) -> None:
        """Accept connections for ever; one too many is closed at once."""
        while True:
            connection, peer = self._listening.accept()
            address = str(peer[0])
            with self._lock:
                busy = self._open.total() >= CONNECTIONS or self._open[address] >= CONNECTIONS_AN_ADDRESS
                if not busy:
                    self._open[address] += 1
            if busy:
                connection.close()
            else:
                threading.Thread(target=self._guarded, args=(connection, address), daemon=True).start()

    def _guarded(self, connection: socket.socket, address: str) -> None:
        try:
            connection.settimeout(_HANDSHAKE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._context.wrap_socket(connection, server_side=True) as link:
                self._answer_all(link, address)
        except (OSError, ValueError):
            log.debug("a connection ended", extra={"peer": address})
        except Exception:
            log.exception("a connection failed")
        finally:
            connection.close()
            with self._lock:
                self._open[address] -= 1
                if not self._open[address]:
                    del self._open[address]

    def _answer_all(self, link: ssl.SSLSocket, address: str) -> None:
        before = b""
        kept: dict[tuple[JobId, AttemptNumber], KeptResult] = {}
        while True:
            link.settimeout(_IDLE_S)
            head, before = _head(link, before)
            if head is None:
                return
            link.settimeout(_SEND_S)
            if self._has_failed_often(address):
                link.sendall(refusal(429, "too_many", "Too many requests of this address were refused; wait a minute."))
                return
            try:
                asked = parse_head(head)
                body = self._body(asked, kept)
            except (WireError, TrustError, RangeError, NotFoundError) as error:
                link.sendall(self._refused(error, address))
                return
            link.sendall(answer_head(200, sum(len(piece) for piece in body), last=asked.last))
            for piece in body:
                for start in range(0, len(piece), _PIECE_BYTES):
                    link.sendall(piece[start : start + _PIECE_BYTES])
            if asked.last:
                return

    def _body(self, asked: Asked, kept: dict[tuple[JobId, AttemptNumber], KeptResult]) -> list[memoryview]:
        """Return what a request may have. The same answer for what is not there and what is another's."""
        key = (asked.job, asked.attempt)
        owner = self._signer(asked)
        result = kept.get(key)
        if result is None or not index_file(self._folder, *key).exists():  # it may have been deleted
            kept.clear()
            result = KeptResult.open(self._folder, *key)
        if result.owner != owner:
            raise NotFoundError(f"Attempt {asked.attempt} of {asked.job} is not kept here.")
        kept[key] = result
        if asked.what == "index":
            return [memoryview(result.index)]
        try:
            return result.spans(number for part in asked.chunks for number in part)
        except NotFoundError as error:
            raise RangeError(str(error)) from error

    def _signer(self, asked: Asked) -> str:
        """Return the key that signed for exactly this request, now; raises WireError, TrustError."""
        try:
            raw = base64.b64decode(asked.envelope, validate=True)
        except (binascii.Error, ValueError) as error:
            raise WireError("The request carries no envelope.") from error
        if not raw:
            raise WireError("The request carries no envelope.")
        with self._trusting:
            try:
                self._trust.refresh()
            except ConfigError as error:  # what was read before still holds
                log.error("trust store unreadable: %s", error)
            opened = open_envelope(raw, FetchResult, self._trust, time.time_ns() // 1_000_000, fresh=True)
        signed = opened.message
        if (signed.site, signed.job, signed.attempt) != (self._site, asked.job, asked.attempt):
            raise WireError("What is signed is not what is asked for.")
        return opened.key

    def _refused(self, error: EdifError, address: str) -> bytes:
        if not isinstance(error, RangeError):
            self._note_failure(address)
        status = {TrustError: 401, WireError: 400, RangeError: 416, NotFoundError: 404}
        found = next(number for kind, number in status.items() if isinstance(error, kind))
        log.info("refused %s: %s", error.code, error, extra={"peer": address})
        return refusal(found, error.code, str(error))

    def _note_failure(self, address: str) -> None:
        with self._lock:
            if len(self._failures) > 10_000:
                self._failures.clear()
            self._failures.setdefault(address, deque(maxlen=FAILURES_AN_ADDRESS)).append(time.monotonic())

    def _has_failed_often(self, address: str) -> bool:
        with self._lock:
            times = self._failures.get(address)
            return bool(times) and len(times) == FAILURES_AN_ADDRESS and time.monotonic() - times[0] < _FAILURES_S  # type: ignore[index, arg-type]


def _head(link: ssl.SSLSocket, before: bytes) -> tuple[bytes | None, bytes]:
    """Return the next request's head, None at the end, and what was read beyond it. Raises OSError for one too long."""
    until = time.monotonic() + _IDLE_S
    data = before
    while (end := data.find(b"\r\n\r\n")) < 0:
        if len(data) > MAX_HEAD_BYTES or time.monotonic() > until:
            raise OSError("The head of a request is too long or too slow.")
        more = link.recv(MAX_HEAD_BYTES)
        if not more:
            return None, b""
        data += more
    return data[:end], data[end + 4 :]


def main() -> None:
    """Serve with the settings in the first argument; says `{"ready": true}` once it listens."""
    die_with_parent()
    harden_parent()
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    endpoint = Endpoint(EndpointSettings(**json.loads(sys.argv[1])))
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"ready": True}), flush=True)
    endpoint.serve()


if __name__ == "__main__":
    main()
