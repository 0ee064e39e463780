"""Every error that a user, an operator or a peer can see, as one tree.

An error says what happened and what the mesh did about it. `code` is stable: it crosses processes and sites together
with the text, and scripts may match on it. A sentence means that the mesh refused or failed; a traceback in front of a
user means that their own code failed.

    EdifError
    +-- ConfigError             a setting is missing or wrong; the text names it
    +-- WireError               bytes that are not a message of ours
    |   +-- VersionError        a peer speaks a protocol version that we do not
    +-- TrustError              bytes that are well formed and must not be believed
    |   +-- UnknownKeyError  BadSignatureError  StaleEnvelopeError  RevokedKeyError  ReplayError  WrongRoleError
    +-- RefusedError            the mesh will not do it; the text says what would have to change
    |   +-- QuotaError  UnknownModelError  NotFoundError
    +-- TransportError          the broker or a link
    |   +-- NoReplyError (NobodyListensError)  StoreFullError  NotConnectedError
    +-- ResultError             a result that is not what its manifest says
    |   +-- ArchiveError  ChunkError  ManifestError  UnsupportedValueError
    +-- JobError                how a job ended, for the one who waits for it
    |   +-- UserCodeError  JobFailedError  JobCancelledError  JobExpiredError
    +-- SiteError               what a site's own machinery reports
        +-- ModelLoadError  SandboxError  RunnerError (NoRunnerError)
"""

from __future__ import annotations


class EdifError(Exception):
    """Base of every error of the mesh; `code` is stable, `str(error)` is one sentence for a person."""

    code: str = "error"


class ConfigError(EdifError):
    """A setting is missing or wrong."""

    code = "config"


class WireError(EdifError):
    """Bytes that are not a message of this protocol."""

    code = "wire"


class VersionError(WireError):
    """The peer speaks a protocol version that this release does not."""

    code = "version"


class TrustError(EdifError):
    """Well-formed bytes that must not be believed."""

    code = "untrusted"


class UnknownKeyError(TrustError):
    """No enrolled identity owns the signing key."""

    code = "unknown_key"


class BadSignatureError(TrustError):
    """The signature does not fit these exact bytes."""

    code = "bad_signature"


class StaleEnvelopeError(TrustError):
    """Issued too far from now, not yet valid, or expired."""

    code = "stale"


class RevokedKeyError(TrustError):
    """The key was revoked."""

    code = "revoked_key"


class ReplayError(TrustError):
    """This was seen before and may not take effect twice."""

    code = "replay"


class WrongRoleError(TrustError):
    """The key is enrolled, but not for what it signed here."""

    code = "wrong_role"


class RefusedError(EdifError):
    """The mesh will not do it; the text says what would have to change."""

    code = "refused"


class QuotaError(RefusedError):
    """A quota or a store is used up."""

    code = "quota"


class UnknownModelError(RefusedError):
    """No site offers the model."""

    code = "unknown_model"


class NotFoundError(RefusedError):
    """No such job, site, model or result."""

    code = "not_found"


class TransportError(EdifError):
    """The broker or the link to it failed."""

    code = "transport"


class NoReplyError(TransportError):
    """Nobody answered in time; the request may or may not have arrived."""

    code = "no_reply"


class NobodyListensError(NoReplyError):
    """The broker says that nobody listens there: the request has not arrived."""

    code = "nobody_listens"


class NotConnectedError(TransportError):
    """There is no connection to the broker."""

    code = "not_connected"


class StoreFullError(TransportError):
    """The broker's store (or this machine's disk) is full; nothing was accepted."""

    code = "store_full"


class ResultError(EdifError):
    """A result that is not what its manifest says."""

    code = "result"


class ResultGoneError(ResultError):
    """The mesh does not keep this result any more: it was deleted, or its time was up."""

    code = "result_gone"


class ArchiveError(ResultError):
    """The archive is malformed or exceeds a limit."""

    code = "archive"


class ChunkError(ResultError):
    """A chunk is missing, altered or foreign."""

    code = "chunk"


class ManifestError(ResultError):
    """The manifest does not belong to this job, or lies about it."""

    code = "manifest"


class UnsupportedValueError(ResultError):
    """A saved value cannot be represented without code; `path` names it, `hint` is the way out."""

    code = "unsupported_value"

    def __init__(self, path: str, type_name: str, hint: str) -> None:
        self.path, self.type_name, self.hint = path, type_name, hint
        super().__init__(f"'{path}' is a {type_name}, which cannot leave the site as data. {hint}")


class JobError(EdifError):
    """How a job ended, for the one who waits for it; `job` is its id."""

    code = "job"

    def __init__(self, text: str, *, job: str = "", code: str | None = None) -> None:
        self.job = job
        if code is not None:
            self.code = code
        super().__init__(text)


class UserCodeError(JobError):
    """The traced code itself raised; the text is its own traceback."""

    code = "user_error"


class JobFailedError(JobError):
    """The mesh gave the job up; the text says why."""

    code = "failed"


class JobCancelledError(JobError):
    """The job was cancelled."""

    code = "cancelled"


class JobExpiredError(JobError):
    """The order's time window closed before the job ended."""

    code = "expired"


class SiteError(EdifError):
    """What a site's own machinery reports."""

    code = "site"


class ModelLoadError(SiteError):
    """A model could not be loaded at this site."""

    code = "model_load"


class RunnerError(SiteError):
    """A runner could not be started or ended without a result."""

    code = "runner"


class NoRunnerError(RunnerError):
    """The machine refuses more processes or descriptors at present; the host itself is well."""

    code = "no_runner"


class SandboxError(SiteError):
    """The sandbox could not be set up; nothing was run."""

    code = "sandbox"


def error_of(code: str, text: str) -> EdifError:
    """Return the error that another process of ours has reported as its code and its sentence."""
    kinds: list[type[EdifError]] = [EdifError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    kind = next((kind for kind in kinds if kind.code == code and kind is not UnsupportedValueError), EdifError)
    error = kind(text)
    error.code = code
    return error
