"""Names of things. Every id is safe as one NATS subject token and as a file name."""

from __future__ import annotations

import re
from typing import NewType

FederationId = NewType("FederationId", str)
JobId = NewType("JobId", str)
"""`j` + 11 hex digits of the creation time in ms + 12 random hex digits, made by the submitting client."""
SiteId = NewType("SiteId", str)
KeyId = NewType("KeyId", str)
"""The first 32 hex digits of the SHA-256 of the raw 32-byte Ed25519 public key."""
Digest = NewType("Digest", str)
"""64 lower-case hex digits of a SHA-256."""
Epoch = NewType("Epoch", int)
"""The coordinator's term; rises by one whenever a coordinator starts to lead."""
AttemptNumber = NewType("AttemptNumber", int)
"""1 for the first try of a job; the fence that older reports lose against."""
BootId = NewType("BootId", str)
"""One run of a site agent; a new one proves that the attempts of the old one are gone."""

_TOKEN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_JOB = re.compile(r"j[0-9a-f]{23}")
_HEX32 = re.compile(r"[0-9a-f]{32}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


def is_job_id(text: str) -> bool:
    """Return whether `text` has the form of a job id."""
    return _JOB.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Return whether `text` may name a site or federation: lower-case letters, digits, dashes; at most 63."""
    return _TOKEN.fullmatch(text) is not None


def is_key_id(text: str) -> bool:
    """Return whether `text` has the form of a key id."""
    return _HEX32.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    """Return whether `text` has the form of a SHA-256 digest."""
    return _HEX64.fullmatch(text) is not None


def job_id(created_at_ms: int, random_bits: int) -> JobId:
    """Return the id of a job created at `created_at_ms` (Unix, UTC) with 48 bits of the caller's randomness."""
    return JobId(f"j{created_at_ms & 0xFFFFFFFFFFF:011x}{random_bits & 0xFFFFFFFFFFFF:012x}")
