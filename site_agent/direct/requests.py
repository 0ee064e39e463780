"""What an endpoint is asked and answers, as plain values: the head of a request, numbers of chunks, the head of an answer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from edif_mesh.domain.ids import AttemptNumber, JobId, is_job_id
from edif_mesh.errors import RefusedError, WireError
from edif_mesh.results.index import MAX_ENTRIES

MAX_HEAD_BYTES = 16 << 10
_PATH = re.compile(r"/v1/results/([a-z0-9]{1,64})/([0-9]{1,4})/(chunks|index)")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    416: "Range Not Satisfiable",
    429: "Too Many Requests",
    503: "Service Unavailable",
}


class RangeError(RefusedError):
    """Chunks that the attempt does not have."""

    code = "range"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    job: JobId
    attempt: AttemptNumber
    what: str
    """`chunks` or `index`."""
    chunks: tuple[range, ...]
    envelope: str
    """In base64, unverified; empty when there was none."""
    last: bool
    """The asker wants the connection closed after the answer."""


def parse_head(head: bytes) -> Asked:
    """Return what a request's head, up to its empty line, asks for; raises WireError."""
    try:
        first, *lines = head.decode("ascii").split("\r\n")
        method, target, version = first.split(" ")
    except ValueError as error:
        raise WireError("This is no HTTP request.") from error
    if method != "GET" or version != "HTTP/1.1":
        raise WireError("Only GET with HTTP/1.1 is answered here.")
    fields = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name.lower() in fields:
            raise WireError("A header is malformed or stands twice.")
        fields[name.lower()] = value.strip()
    if fields.get("content-length", "0") != "0" or "transfer-encoding" in fields:
        raise WireError("A request here has no body.")
    path, _, query = target.partition("?")
    match = _PATH.fullmatch(path)
    if match is None or not is_job_id(match[1]):
        raise WireError("The path is /v1/results/JOB/ATTEMPT/chunks?numbers=... or .../index.")
    numbers = parse_numbers(query.removeprefix("numbers=")) if match[3] == "chunks" else ()
    scheme, _, envelope = fields.get("authorization", "").partition(" ")
    return Asked(
        JobId(match[1]),
        AttemptNumber(int(match[2])),
        match[3],
        numbers,
        envelope if scheme == "EDIF" else "",
        fields.get("connection", "").lower() == "close",
    )


def parse_numbers(text: str) -> tuple[range, ...]:
    """Return the chunks that a text like `0-63,70` names; raises WireError."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7}))?", part)
        if match is None:
            raise WireError("Chunks are asked for as numbers=0-63,70.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < MAX_ENTRIES:
            raise WireError("Chunks are asked for as numbers=0-63,70.")
        found.append(range(first, last + 1))
    if sum(len(part) for part in found) > MAX_ENTRIES:
        raise WireError("Too many chunks were asked for at once.")
    return tuple(found)


def answer_head(status: int, length: int, *, last: bool) -> bytes:
    """Return the head of an answer with a body of so many bytes."""
    return (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Length: {length}\r\n"
        f"Content-Type: {'application/octet-stream' if status == 200 else 'application/json'}\r\n"
        f"Cache-Control: no-store\r\n{'Connection: close' if last else 'Connection: keep-alive'}\r\n\r\n"
    ).encode()


def refusal(status: int, code: str, text: str) -> bytes:
    """Return a whole answer that says no; the connection ends with it."""
    body = json.dumps({"error": {"code": code, "text": text}}).encode()
    return answer_head(status, len(body), last=True) + body
