"""Bytes of strangers -> verified messages of ours, or an error of ours: nothing else comes out of here."""

from __future__ import annotations

import base64
import logging
import time
from contextlib import suppress
from typing import Any, TypeVar

from edif_mesh.domain.ids import JobId, is_job_id
from edif_mesh.domain.job import Failure
from edif_mesh.errors import ConfigError, EdifError, TrustError, UnknownKeyError, WireError
from edif_mesh.identity.trust import TrustStore
from edif_mesh.wire.codec import load_json
from edif_mesh.wire.envelope import Opened, open_envelope
from edif_mesh.wire.messages import AskJob, AskJobs, AskMesh, CancelJob, DeleteJob, Manifest, Report
from edif_mesh.wire.version import payload_type

log = logging.getLogger(__name__)

Question = AskJob | AskJobs | AskMesh | CancelJob | DeleteJob
_QUESTIONS: dict[str, type[Any]] = {
    payload_type(kind): cls
    for kind, cls in (
        ("ask_job", AskJob),
        ("ask_jobs", AskJobs),
        ("ask_mesh", AskMesh),
        ("cancel_job", CancelJob),
        ("delete_job", DeleteJob),
    )
}
REFRESH_S = 1.0
"""How often the trust store's file is looked at; an unknown key makes it sooner, at most every `HURRY_S`."""
HURRY_S = 0.1

M = TypeVar("M")


class Opener:
    """Opens envelopes against the coordinator's own trust store, which follows its file."""

    def __init__(self, trust: TrustStore) -> None:
        self._trust = trust
        self._looked_at = time.monotonic()
        self._told = ""

    def open(self, raw: bytes | str, expected: type[M], now_ms: int, *, fresh: bool = False) -> Opened[M]:
        """Return the verified message; raises WireError or TrustError."""
        self._refresh(REFRESH_S)
        try:
            return open_envelope(raw, expected, self._trust, now_ms, fresh=fresh)
        except UnknownKeyError:
            if not self._refresh(HURRY_S):
                raise
            return open_envelope(raw, expected, self._trust, now_ms, fresh=fresh)

    def open_question(self, raw: bytes, now_ms: int) -> Opened[Any]:
        """Return the verified request of a researcher; raises WireError or TrustError."""
        value = load_json(raw)
        kind = value.get("payloadType") if isinstance(value, dict) else None
        expected = _QUESTIONS.get(kind) if isinstance(kind, str) else None
        if expected is None:
            raise WireError(f"This is no question to a coordinator: its type is {str(kind)[:60]!r}.")
        return self.open(raw, expected, now_ms, fresh=True)

    def open_report(self, raw: bytes, now_ms: int) -> tuple[Opened[Report], Manifest | None]:
        """Return the verified report and its manifest, None when it has none that this site signed (it then fails)."""
        opened = self.open(raw, Report, now_ms)
        report = opened.message
        if opened.identity.name != report.site:
            raise TrustError(f"{opened.identity.name} may not report for {report.site}.")
        if report.manifest is None:
            return opened, None
        try:
            signed = self.open(report.manifest, Manifest, now_ms)
        except EdifError as error:
            log.warning("manifest refused", extra={"job": report.job, "site": report.site, "reason": str(error)})
            return opened, None
        return opened, signed.message if signed.identity.name == report.site else None

    def _refresh(self, after_s: float) -> bool:
        """Follow the file; return whether it was looked at."""
        now = time.monotonic()
        if now - self._looked_at < after_s:
            return False
        self._looked_at = now
        try:
            self._trust.refresh()
            self._told = ""
        except ConfigError as error:
            if str(error) != self._told:
                log.error("trust store not read; the last good one stays", extra={"reason": str(error)})
                self._told = str(error)
        return True


def claimed_job(raw: bytes) -> JobId | None:
    """Return the job id that unverified bytes of an order claim, so that its sender can be told; trust it for nothing."""
    with suppress(EdifError, ValueError, TypeError, KeyError):
        body = load_json(base64.b64decode(load_json(raw)["payload"], validate=True))
        job = body["job"]
        if isinstance(job, str) and is_job_id(job):
            return JobId(job)
    return None


def failure_of(error: EdifError) -> Failure:
    """Return the error as it crosses to another process."""
    return Failure(error.code, str(error)[:1_000])
