"""One TLS connection to a site's own endpoint, read with as little Python as the standard library allows. For threads.

The certificate is believed because the site has signed its SHA-256 in the manifest, and for nothing else; that is checked
before a byte of a request leaves. Records are decrypted out of a buffer in memory: one system call then brings many.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import socket
import ssl
import time
from urllib.parse import urlsplit

from edif_mesh.errors import ResultError
from edif_mesh.wire.messages import DirectEndpoint

CONNECT_S = 1.5
_SILENCE_S = 5.0
_READ_BYTES = 256 << 10
_MAX_HEAD_BYTES = 16 << 10
_MAX_REFUSAL_BYTES = 4 << 10


class DirectError(ResultError):
    """A site's own endpoint is not the one that the manifest names, refuses, or does not keep to the protocol."""

    code = "direct"


class DirectLink:
    """An open connection. Not for several threads at once, but `close` may be called by any."""

    def __init__(self, endpoint: DirectEndpoint) -> None:
        """Connect. Raises OSError when nobody answers in time, DirectError for another certificate."""
        where = urlsplit(endpoint.url)
        if where.scheme != "https" or not where.hostname or where.port is None:
            raise DirectError("The manifest's endpoint is no https://host:port.")
        self._host = where.netloc
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # pinned instead
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out)
        self._raw = memoryview(bytearray(_READ_BYTES))
        self._before = b""
        self._socket = socket.create_connection((where.hostname, where.port), timeout=CONNECT_S)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._shake_hands(time.monotonic() + 2 * CONNECT_S)
            found = hashlib.sha256(self._tls.getpeercert(binary_form=True) or b"").hexdigest()
            if not hmac.compare_digest(found, endpoint.certificate_sha256):
                raise DirectError("The endpoint has another certificate than the site has signed; nothing was asked.")
        except BaseException:
            self._socket.close()
            raise

    def ask(self, path: str, envelope: str) -> None:
        """Send a request; several may wait for their answers, which come in order. Raises OSError."""
        proof = base64.b64encode(envelope.encode()).decode()
        self._tls.write(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: EDIF {proof}\r\n\r\n".encode())
        self._flush()

    def begin_answer(self, expected_bytes: int) -> None:
        """Read the head of the next answer, whose body must have exactly so many bytes. Raises DirectError, OSError."""
        until = time.monotonic() + _SILENCE_S
        data = self._before
        piece = memoryview(bytearray(_MAX_HEAD_BYTES))
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > _MAX_HEAD_BYTES or time.monotonic() > until:
                raise DirectError("The endpoint's answer has no end of its head.")
            data += bytes(piece[: self._read(piece)])
        head, self._before = data[:end].decode("latin-1"), data[end + 4 :]
        first, *lines = head.split("\r\n")
        length = next((line[15:].strip() for line in lines if line.lower().startswith("content-length:")), "")
        if not first.startswith("HTTP/1.1 200 "):
            raise DirectError(f"The endpoint refused: {first[:60]} {self._refusal(length)}")
        if length != str(expected_bytes):
            raise DirectError(f"The endpoint would send {length[:20]} bytes instead of {expected_bytes}.")

    def read_into(self, buffer: memoryview) -> None:
        """Fill the buffer with the next bytes of the body. Raises OSError when they do not come in time."""
        filled = min(len(self._before), len(buffer))
        buffer[:filled] = self._before[:filled]
        self._before = self._before[filled:]
        until = time.monotonic() + _SILENCE_S
        size, read = len(buffer), self._tls.read
        while filled < size:
            try:
                count = read(size - filled, buffer[filled:])
            except ssl.SSLWantReadError:
                if time.monotonic() > until:
                    raise OSError("The endpoint sends too slowly.") from None
                self._receive()
                continue
            if not count:
                raise OSError("The endpoint hung up.")
            filled += int(count)

    def close(self) -> None:
        """Hang up, also on a thread that reads; idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _refusal(self, length: str) -> str:
        if not length.isdigit() or int(length) > _MAX_REFUSAL_BYTES:
            return ""
        body = bytearray(int(length))
        self.read_into(memoryview(body))
        return body.decode("utf-8", "replace")

    def _read(self, buffer: memoryview) -> int:
        """Read some bytes, at least one; raises OSError at the end of the connection."""
        while True:
            try:
                count = self._tls.read(len(buffer), buffer)
            except ssl.SSLWantReadError:
                self._receive()
                continue
            if not count:
                raise OSError("The endpoint hung up.")
            return int(count)

    def _receive(self) -> None:
        count = self._socket.recv_into(self._raw)
        if not count:
            raise OSError("The endpoint hung up.")
        self._in.write(self._raw[:count])

    def _flush(self) -> None:
        if self._out.pending:
            self._socket.sendall(self._out.read())

    def _shake_hands(self, until: float) -> None:
        while True:
            try:
                self._tls.do_handshake()
                self._flush()
                self._socket.settimeout(_SILENCE_S)
                return
            except ssl.SSLWantReadError:
                self._flush()
                if time.monotonic() > until:
                    raise OSError("The endpoint does not finish its handshake.") from None
                self._receive()
