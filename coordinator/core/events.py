"""What can happen to the coordinator, in the past tense. Signatures and senders were proven before an event is made."""

from __future__ import annotations

from dataclasses import dataclass

from edif_mesh.domain.ids import AttemptNumber, BootId, Digest, Epoch, JobId, KeyId, SiteId
from edif_mesh.wire.messages import Advert, Manifest, Order, Report


@dataclass(frozen=True, slots=True)
class TermStarted:
    """This coordinator leads, with a new epoch; its state was recovered from the record."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class OrderReceived:
    """A researcher's signed order arrived (perhaps again)."""

    order: Order
    digest: Digest
    envelope: str
    owner: KeyId
    owner_name: str = ""
    organisation: str = ""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """A researcher wants an end; `reply_to` is the shell's own address for the answer."""

    job: JobId
    by: KeyId
    reason: str
    reply_to: str = ""


@dataclass(frozen=True, slots=True)
class DeletionAsked:
    """A researcher wants a job's payload, result and lines deleted everywhere."""

    job: JobId
    by: KeyId
    reply_to: str = ""


@dataclass(frozen=True, slots=True)
class JobPurged:
    """The broker has deleted all that it held of a job."""

    job: JobId


@dataclass(frozen=True, slots=True)
class StoreMeasured:
    """How full the broker is; `full` says what is, in a sentence, empty: nothing is."""

    full: str


@dataclass(frozen=True, slots=True)
class JobAsked:
    """A researcher asked for a job's state."""

    job: JobId
    by: KeyId
    explain: bool
    reply_to: str


@dataclass(frozen=True, slots=True)
class JobsAsked:
    """A researcher asked for the list of their jobs."""

    by: KeyId
    limit: int
    reply_to: str


@dataclass(frozen=True, slots=True)
class MeshAsked:
    """A researcher asked which sites and models there are."""

    reply_to: str


@dataclass(frozen=True, slots=True)
class AdvertReceived:
    """A site spoke of itself."""

    advert: Advert
    reply_to: str = ""


@dataclass(frozen=True, slots=True)
class SiteReported:
    """A site reported on an attempt; `manifest` is the opened manifest, verified as that site's, when it SUCCEEDED."""

    report: Report
    manifest: Manifest | None = None
    reply_to: str = ""


@dataclass(frozen=True, slots=True)
class GrantAnswered:
    """The site has taken the grant into its journal; a report will follow."""

    job: JobId
    attempt: AttemptNumber
    site: SiteId
    boot: BootId


@dataclass(frozen=True, slots=True)
class GrantUndelivered:
    """The broker says that nobody listens at the site's address: this sending did not arrive."""

    job: JobId
    attempt: AttemptNumber
    site: SiteId


@dataclass(frozen=True, slots=True)
class SiteDisconnected:
    """The broker says that the site agent's connection is gone."""

    site: SiteId


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The coordinator's own connection to the broker is gone: silence now proves nothing about sites."""


@dataclass(frozen=True, slots=True)
class LinkReturned:
    """The coordinator's own connection is back."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


Event = (
    TermStarted
    | OrderReceived
    | CancelRequested
    | DeletionAsked
    | JobPurged
    | StoreMeasured
    | JobAsked
    | JobsAsked
    | MeshAsked
    | AdvertReceived
    | SiteReported
    | GrantAnswered
    | GrantUndelivered
    | SiteDisconnected
    | LinkLost
    | LinkReturned
    | Ticked
)
