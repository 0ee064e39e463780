"""Every message of the mesh, one frozen dataclass each. Core and wire use the same classes: there is no translation.

A message whose `kind` is in `SIGNED_BY` travels only inside an envelope (see `envelope.py`) signed by a key of that
role; the receiver checks the role. Instants are Unix milliseconds UTC (`_at_ms`), spans are milliseconds (`_ms`), sizes
are bytes (`_bytes`). An envelope inside a message is the exact JSON text that was signed (`str`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from edif_mesh.domain.attempt import AttemptStatus, Blame, Receipt
from edif_mesh.domain.ids import AttemptNumber, BootId, Digest, Epoch, FederationId, JobId, KeyId, SiteId
from edif_mesh.domain.job import Failure, JobClass, JobStatus, Limits
from edif_mesh.domain.site import Device, ModelOffer, ModelRef, SiteStatus, Versions


class Role(StrEnum):
    """What an enrolled key may sign."""

    RESEARCHER = "researcher"
    GATEWAY = "gateway"
    COORDINATOR = "coordinator"
    SITE = "site"


# ------------------------------------------------------------------------------------------- researcher -> mesh


@dataclass(frozen=True, slots=True)
class PayloadRef:
    """Which bytes the job is: the serialized trace, opaque to all but the sandboxed child."""

    digest: Digest
    """SHA-256 of the payload exactly as stored (compressed when `compressed`)."""
    size_bytes: int
    codec: str = "nnsight-0.8"
    compressed: bool = False
    """One zstd frame."""
    uncompressed_bytes: int = 0
    """What the researcher declares; the runner stops decompressing there."""


COMPRESSIONS = ("auto", "off", "fast", "best")
WIRE_DTYPES = ("", "float16", "bfloat16", "int8")


@dataclass(frozen=True, slots=True)
class ResultOptions:
    """How the researcher wants a result to travel."""

    wire_dtype: str = ""
    """`float16`, `bfloat16` or `int8`: floating tensors are sent in this dtype and come back in their own, rounded; empty: exact."""
    compression: str = "auto"
    """`auto`, `off`, `fast` or `best`. Lossless; `auto` weighs what it saves against the measured link."""
    link_bytes_per_s: int = 0
    """What the client last measured of its own downloads; 0: unknown."""
    seal_to: str = ""
    """X25519 public key, hexadecimal: the site seals every chunk to it; empty: not sealed."""
    session: str = ""
    """Jobs of one key and one session share chunks that are the same; empty: none are shared."""


@dataclass(frozen=True, slots=True)
class Audience:
    """Where the job may run; empty means anywhere."""

    sites: tuple[SiteId, ...] = ()
    countries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Order:
    """Researcher -> coordinator and, unchanged, every site that is granted it: run this payload on this model.

    Published on a durable stream until the coordinator has recorded it; silence after that means the client asks for a
    `JobSnapshot`. The site verifies the researcher's signature itself, against its own trust store.
    """

    federation: FederationId
    job: JobId
    nonce: str
    issued_at_ms: int
    not_before_ms: int
    expires_at_ms: int
    payload: PayloadRef
    model: ModelRef
    client: Versions
    env: dict[str, str | None] = field(default_factory=dict)
    """nnsight's per-request environment: `attn_implementation`, `peft`."""
    audience: Audience = Audience()
    max_attempts: int = 4
    limits: Limits = Limits()
    job_class: JobClass = JobClass.INTERACTIVE
    acting_for: str = ""
    """The user a shared gateway acts for; empty when the signer is the user."""
    name: str = ""
    """The researcher's own label, for lists."""
    sandbox: str = ""
    """The least sandbox profile (`base`, `namespaced`, `strict`) under which this may run; empty: any."""
    results: ResultOptions = ResultOptions()
    kind: Literal["order"] = "order"


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Researcher -> coordinator: end this job. Answered with a `JobSnapshot`; idempotent."""

    job: JobId
    issued_at_ms: int
    reason: str = "cancelled by the researcher"
    kind: Literal["cancel_job"] = "cancel_job"


@dataclass(frozen=True, slots=True)
class DeleteJob:
    """Researcher -> coordinator: delete payload, result and printed lines of this ended job, everywhere.

    Answered with a `JobSnapshot` once that is recorded; idempotent. What the record keeps is who ran what, where and when.
    """

    job: JobId
    issued_at_ms: int
    kind: Literal["delete_job"] = "delete_job"


@dataclass(frozen=True, slots=True)
class AskJob:
    """Researcher -> coordinator: what is the state of this job? Answered with a `JobSnapshot` or a `Refusal`."""

    job: JobId
    issued_at_ms: int
    explain: bool = False
    """Also say why it is where it is: `why` in the answer."""
    kind: Literal["ask_job"] = "ask_job"


@dataclass(frozen=True, slots=True)
class AskJobs:
    """Researcher -> coordinator: list my jobs, newest first. Answered with a `JobList`."""

    issued_at_ms: int
    limit: int = 50
    kind: Literal["ask_jobs"] = "ask_jobs"


@dataclass(frozen=True, slots=True)
class AskMesh:
    """Researcher -> coordinator: which sites and models are there? Answered with a `MeshView`."""

    issued_at_ms: int
    kind: Literal["ask_mesh"] = "ask_mesh"


@dataclass(frozen=True, slots=True)
class FetchResult:
    """Researcher -> a site's own endpoint, in the header of a request: I may read this attempt's result.

    Answered by HTTP; a site that does not hold it, or not for this key, answers the same.
    """

    site: SiteId
    job: JobId
    attempt: AttemptNumber
    issued_at_ms: int
    kind: Literal["fetch_result"] = "fetch_result"


# ------------------------------------------------------------------------------------------- coordinator -> site


@dataclass(frozen=True, slots=True)
class Grant:
    """Coordinator -> site: this order may run at your site as this attempt until the lease ends.

    Sent inside `PlaceAttempt` and repeated until the site reports; a grant never creates an order.
    """

    order_digest: Digest
    """SHA-256 of the exact order envelope bytes."""
    job: JobId
    site: SiteId
    attempt: AttemptNumber
    epoch: Epoch
    issued_at_ms: int
    lease_ms: int
    """From arrival at the site, on the site's own monotonic clock; extended by `LeaseRenewed`."""
    expires_at_ms: int
    """After this instant the grant must not start anything."""
    kind: Literal["grant"] = "grant"


@dataclass(frozen=True, slots=True)
class PlaceAttempt:
    """Coordinator -> site, unsigned bundle of two signed envelopes: the grant and the order that it places.

    Answered at once with `Received` once the site has journaled it (or refused it); no answer means: send again.
    """

    grant: str
    order: str
    kind: Literal["place_attempt"] = "place_attempt"


@dataclass(frozen=True, slots=True)
class StopAttempt:
    """Coordinator -> site: end this attempt now and report. Repeated until a terminal report arrives."""

    job: JobId
    attempt: AttemptNumber
    site: SiteId
    epoch: Epoch
    issued_at_ms: int
    reason: str
    """`cancelled`, `expired` or `superseded`."""
    kind: Literal["stop_attempt"] = "stop_attempt"


@dataclass(frozen=True, slots=True)
class AttemptLease:
    """One attempt's lease inside a `LeaseRenewed`."""

    job: JobId
    attempt: AttemptNumber


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    """Coordinator -> site, in answer to an `Advert`: these attempts are current; keep them for `lease_ms` more.

    An attempt that runs at the site and is not named is no longer current: the site stops it.
    """

    site: SiteId
    epoch: Epoch
    advert_sequence: int
    issued_at_ms: int
    lease_ms: int
    attempts: tuple[AttemptLease, ...]
    drop: tuple[JobId, ...] = ()
    """Deleted jobs: the site drops what it holds of them, and says so in its next advert."""
    kind: Literal["lease_renewed"] = "lease_renewed"


@dataclass(frozen=True, slots=True)
class ReportReceived:
    """Coordinator -> site, in answer to a `Report`: recorded (or known); drop it from the outbox.

    `result_committed` is true when the job's one committed result is this attempt's; the site then drops the archive
    after its own retention time, otherwise at once.
    """

    site: SiteId
    job: JobId
    attempt: AttemptNumber
    sequence: int
    epoch: Epoch
    issued_at_ms: int
    result_committed: bool = False
    kind: Literal["report_received"] = "report_received"


# ------------------------------------------------------------------------------------------- site -> coordinator


@dataclass(frozen=True, slots=True)
class AttemptRef:
    """One attempt that a site holds, inside an `Advert`."""

    job: JobId
    attempt: AttemptNumber
    status: AttemptStatus


@dataclass(frozen=True, slots=True)
class Advert:
    """Site -> coordinator, every 5 s and at once on change: capacity, models, policy and the attempts held.

    Core NATS request; answered with `LeaseRenewed`. 15 s of silence make the site suspect, 30 s make its attempts lost.
    """

    site: SiteId
    boot: BootId
    sequence: int
    issued_at_ms: int
    valid_ms: int
    status: SiteStatus
    country: str
    slots: int
    free_slots: int
    memory_bytes: int
    """For runners, beyond the loaded models."""
    free_memory_bytes: int
    devices: tuple[Device, ...]
    models: tuple[ModelOffer, ...]
    versions: Versions
    limits: Limits
    """The most that an order may ask for here."""
    attempts: tuple[AttemptRef, ...]
    sandbox: str = ""
    """The confinement profile that passed its self-test; empty means that the site runs nothing."""
    note: str = ""
    models_bytes: int = 0
    """For loaded models together, each as its `memory_bytes`; 0: not stated, so no bound."""
    free_models_bytes: int = 0
    """Of `models_bytes`: neither taken by a model nor promised to one."""
    evictable_bytes: int = 0
    """Of `models_bytes`: taken by models that could be evicted now."""
    dropped: tuple[JobId, ...] = ()
    """Deleted jobs of which nothing is held here any more, until the coordinator asks no longer."""
    kind: Literal["advert"] = "advert"


@dataclass(frozen=True, slots=True)
class Lender:
    """An earlier attempt of the same key and session, at the same site, some of whose chunks a result uses again."""

    job: JobId
    attempt: AttemptNumber


@dataclass(frozen=True, slots=True)
class DirectEndpoint:
    """Where a site itself serves a result; used when a client reaches it and it is faster than the broker."""

    url: str
    """`https://host:port`; the client adds the path."""
    certificate_sha256: str
    """Of the certificate in DER, hexadecimal: the client believes exactly this one."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Site -> researcher (inside `Report` and `JobSnapshot`, as its own envelope): what the result is.

    Bound to one order and one attempt. `root` is the SHA-256 of the index, which names every chunk's length, form and
    SHA-256 (`results/index.py`). The index itself travels in `index` when it is short, else as chunks of its own.
    """

    order_digest: Digest
    job: JobId
    attempt: AttemptNumber
    site: SiteId
    archive_bytes: int
    """Of the archive as it is read: not compressed, not sealed."""
    stored_bytes: int
    """Of this attempt's own chunks as they travel; without those that `lenders` hold."""
    chunks: int
    root: Digest
    issued_at_ms: int
    receipt: Receipt
    index: str = ""
    """The index in base64, or empty: then it travels as the chunks `index`, `index-1`, ..."""
    lenders: tuple[Lender, ...] = ()
    sealed_key: str = ""
    """Base64: the key of the chunks, sealed (HPKE) to the order's `seal_to`; empty: not sealed."""
    direct: tuple[DirectEndpoint, ...] = ()
    keep_until_ms: int = 0
    """Until when the result can be fetched; 0: not stated."""
    format: str = "edif-archive-2"
    kind: Literal["manifest"] = "manifest"


@dataclass(frozen=True, slots=True)
class ResultPart:
    """Site -> researcher, beside the chunks while they are stored: the index entries of some that are durable now.

    Makes them verifiable before there is a manifest. Only the manifest makes them a result.
    """

    order_digest: Digest
    job: JobId
    attempt: AttemptNumber
    site: SiteId
    first: int
    """The number of the first chunk that is described here."""
    entries: str
    """Index entries in base64, in order."""
    issued_at_ms: int
    sealed_key: str = ""
    """As in `Manifest`."""
    kind: Literal["result_part"] = "result_part"


@dataclass(frozen=True, slots=True)
class Report:
    """Site -> coordinator: what became of an attempt. Journaled first, repeated until `ReportReceived`.

    `sequence` rises by one per attempt; a report older than one already applied is answered and ignored.
    """

    site: SiteId
    boot: BootId
    job: JobId
    attempt: AttemptNumber
    sequence: int
    status: AttemptStatus
    issued_at_ms: int
    order_digest: Digest
    detail: str = ""
    """Progress in words while LOADING; the reason when DECLINED or RELEASED."""
    failure: Failure | None = None
    blame: Blame | None = None
    manifest: str | None = None
    """The signed manifest, when SUCCEEDED."""
    receipt: Receipt | None = None
    epoch: Epoch = Epoch(0)
    """The epoch of the grant this answers."""
    kind: Literal["report"] = "report"


# ------------------------------------------------------------------------------------------- mesh -> researcher


@dataclass(frozen=True, slots=True)
class AttemptView:
    """One attempt as the researcher sees it."""

    attempt: AttemptNumber
    site: SiteId
    status: AttemptStatus
    granted_at_ms: int
    ended_at_ms: int | None = None
    started_at_ms: int | None = None
    detail: str = ""
    failure: Failure | None = None
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True)
class SiteVerdict:
    """One site in a placement decision: refused with reasons, or scored."""

    site: SiteId
    reasons: tuple[Failure, ...] = ()
    """Empty when the site fits; else each code and what would have to change."""
    score_s: float | None = None
    terms: dict[str, float] = field(default_factory=dict)
    """The score's terms in seconds."""


@dataclass(frozen=True, slots=True)
class JobSnapshot:
    """Coordinator -> researcher: the whole state of a job. Answers `AskJob`, and is published on every change.

    `version` rises with every change of the job: a watcher drops what is not newer, and asks again after a gap.
    """

    job: JobId
    version: int
    status: JobStatus
    text: str
    """One sentence for a person: site, queue position, waiting time, or how it ended."""
    model: ModelRef
    owner: KeyId
    submitted_at_ms: int
    updated_at_ms: int
    expires_at_ms: int
    attempts: tuple[AttemptView, ...] = ()
    position: int | None = None
    """1 for the next in the queue; None when not queued."""
    eta_ms: int | None = None
    name: str = ""
    site: SiteId | None = None
    """Where the current attempt is."""
    failure: Failure | None = None
    manifest: str | None = None
    """The site's signed manifest envelope, when SUCCEEDED."""
    why: tuple[SiteVerdict, ...] = ()
    order_digest: Digest = Digest("")
    epoch: Epoch = Epoch(0)
    result_bytes: int = 0
    """What is kept of its result."""
    keep_until_ms: int | None = None
    """Until when; None when there is no result."""
    deleted_at_ms: int | None = None
    """When its owner had it deleted."""
    kind: Literal["job_snapshot"] = "job_snapshot"


@dataclass(frozen=True, slots=True)
class JobList:
    """Coordinator -> researcher: answers `AskJobs`, newest first, without manifests."""

    jobs: tuple[JobSnapshot, ...]
    kind: Literal["job_list"] = "job_list"


@dataclass(frozen=True, slots=True)
class SiteView:
    """One site as the coordinator sees it."""

    site: SiteId
    status: SiteStatus
    country: str
    seen_at_ms: int
    slots: int
    free_slots: int
    memory_bytes: int
    free_memory_bytes: int
    devices: tuple[Device, ...]
    models: tuple[ModelOffer, ...]
    versions: Versions
    attempts: tuple[AttemptRef, ...]
    sandbox: str = ""
    note: str = ""
    models_bytes: int = 0
    free_models_bytes: int = 0
    evictable_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MeshView:
    """Coordinator -> researcher: answers `AskMesh`."""

    federation: FederationId
    epoch: Epoch
    now_ms: int
    sites: tuple[SiteView, ...]
    queued: int
    running: int
    kind: Literal["mesh_view"] = "mesh_view"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Coordinator or site -> whoever asked: no, and why. Also published for an order that was not accepted."""

    failure: Failure
    job: JobId | None = None
    kind: Literal["refusal"] = "refusal"


@dataclass(frozen=True, slots=True)
class Received:
    """Site -> coordinator, in answer to `PlaceAttempt` and `StopAttempt`: it has arrived; a `Report` will follow."""

    site: SiteId
    boot: BootId
    issued_at_ms: int
    kind: Literal["received"] = "received"


@dataclass(frozen=True, slots=True)
class LogLines:
    """Site -> researcher: what the traced code printed, in order; published while the job runs and kept for a while."""

    job: JobId
    attempt: AttemptNumber
    site: SiteId
    first: int
    """The number of the first line here, from 0 within the attempt; a gap means that lines were dropped."""
    lines: tuple[str, ...]
    issued_at_ms: int
    kind: Literal["log_lines"] = "log_lines"


Message = (
    Order
    | CancelJob
    | DeleteJob
    | AskJob
    | AskJobs
    | AskMesh
    | FetchResult
    | Grant
    | PlaceAttempt
    | StopAttempt
    | LeaseRenewed
    | ReportReceived
    | Advert
    | Manifest
    | ResultPart
    | Report
    | JobSnapshot
    | JobList
    | MeshView
    | Refusal
    | Received
    | LogLines
)

SIGNED_BY: dict[str, frozenset[Role]] = {
    "order": frozenset({Role.RESEARCHER, Role.GATEWAY}),
    "cancel_job": frozenset({Role.RESEARCHER, Role.GATEWAY}),
    "delete_job": frozenset({Role.RESEARCHER, Role.GATEWAY}),
    "ask_job": frozenset({Role.RESEARCHER, Role.GATEWAY}),
    "ask_jobs": frozenset({Role.RESEARCHER, Role.GATEWAY}),
    "ask_mesh": frozenset({Role.RESEARCHER, Role.GATEWAY}),
    "fetch_result": frozenset({Role.RESEARCHER, Role.GATEWAY}),
    "grant": frozenset({Role.COORDINATOR}),
    "stop_attempt": frozenset({Role.COORDINATOR}),
    "lease_renewed": frozenset({Role.COORDINATOR}),
    "report_received": frozenset({Role.COORDINATOR}),
    "job_snapshot": frozenset({Role.COORDINATOR}),
    "job_list": frozenset({Role.COORDINATOR}),
    "mesh_view": frozenset({Role.COORDINATOR}),
    "refusal": frozenset({Role.COORDINATOR, Role.SITE}),
    "advert": frozenset({Role.SITE}),
    "manifest": frozenset({Role.SITE}),
    "result_part": frozenset({Role.SITE}),
    "report": frozenset({Role.SITE}),
    "received": frozenset({Role.SITE}),
    "log_lines": frozenset({Role.SITE}),
}
"""Who may sign which kind. `place_attempt` alone travels bare: it only carries two signed envelopes."""
