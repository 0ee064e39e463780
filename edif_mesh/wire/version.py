"""The protocol's version: it stands in every payload type, so a peer of another major version is told so."""

from __future__ import annotations

PROTOCOL = 1
"""Raised when a message changes its meaning or loses a field. Adding an optional field does not raise it."""


def payload_type(kind: str) -> str:
    """Return the DSSE payload type of a message kind; the signature covers it."""
    return f"application/vnd.edif.{kind}.v{PROTOCOL}+json"
