"""What can happen to a site: every input of `decide`, already opened and verified by the shell."""

from __future__ import annotations

from dataclasses import dataclass

from edif_mesh.domain.attempt import Blame, Receipt
from edif_mesh.domain.ids import Digest, Epoch, KeyId
from edif_mesh.domain.job import Failure
from edif_mesh.domain.site import ModelOffer
from edif_mesh.wire.messages import Grant, LeaseRenewed, Order, ReportReceived, Role, StopAttempt
from site_agent.core.state import AttemptKey


@dataclass(frozen=True, slots=True)
class Signer:
    """Who signed an order, as this site's own trust store knows them."""

    name: str
    role: Role
    models: tuple[str, ...] = ()
    """Repo ids that the key may use; empty means any."""
    key: KeyId = KeyId("")


@dataclass(frozen=True, slots=True)
class GrantReceived:
    """The coordinator places an order here. Both signatures were verified; `digest` is the order's own bytes'."""

    grant: Grant
    order: Order
    digest: Digest
    signer: Signer


@dataclass(frozen=True, slots=True)
class BadOrderReceived:
    """A verified grant for order bytes (of this digest) that this site does not believe."""

    grant: Grant
    digest: Digest
    failure: Failure


@dataclass(frozen=True, slots=True)
class Distrusted:
    """Bytes arrived that this site does not believe; nothing changes, the audit log keeps it."""

    failure: Failure
    detail: str


@dataclass(frozen=True, slots=True)
class StopReceived:
    """The coordinator ends an attempt."""

    stop: StopAttempt


@dataclass(frozen=True, slots=True)
class LeaseAnswered:
    """The answer to the advert that left at `sent_monotonic_ms`: a lease counts from there, never from its arrival."""

    renewal: LeaseRenewed
    sent_monotonic_ms: int


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """The runner executes the traced code."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class AttemptComputed:
    """The runner has ended well; its result is on the way."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class AttemptSucceeded:
    """The whole result is stored at the broker; `manifest` is signed."""

    key: AttemptKey
    manifest: str
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The attempt ended without a result."""

    key: AttemptKey
    failure: Failure
    blame: Blame
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True)
class AttemptStopped:
    """The runner of an attempt that was to be stopped is gone, and with it all that it held."""

    key: AttemptKey
    receipt: Receipt | None = None
    """None when no runner had begun."""


@dataclass(frozen=True, slots=True)
class PayloadRefused:
    """The payload is missing or not the one the order names; nothing was run."""

    key: AttemptKey
    failure: Failure


@dataclass(frozen=True, slots=True)
class ModelProgressed:
    """A model is being loaded: how far."""

    repo_id: str
    detail: str


@dataclass(frozen=True, slots=True)
class ModelLoaded:
    """A host is ready; `offer` has its facts."""

    offer: ModelOffer


@dataclass(frozen=True, slots=True)
class ModelFailed:
    """A model could not be loaded."""

    repo_id: str
    text: str


@dataclass(frozen=True, slots=True)
class ModelEvicted:
    """The host of a model that was to be evicted is gone, with its runners and all its memory."""

    repo_id: str


@dataclass(frozen=True, slots=True)
class HostLost:
    """The host process of a loaded model is gone, and its children with it."""

    repo_id: str
    text: str


@dataclass(frozen=True, slots=True)
class ReportAcknowledged:
    """The coordinator has recorded a report."""

    received: ReportReceived


@dataclass(frozen=True, slots=True)
class AdvertDue:
    """The heartbeat is about to build an advert; it gets the next number."""


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """The operator ends the agent: hand everything back."""


@dataclass(frozen=True, slots=True)
class Orphan:
    """An attempt that an earlier run of the agent held when it died."""

    key: AttemptKey
    digest: Digest
    epoch: Epoch
    sequence: int


@dataclass(frozen=True, slots=True)
class Restarted:
    """The agent has started over its journal."""

    orphans: tuple[Orphan, ...]


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""

    forget: bool = False
    """Also drop what is remembered of orders that can no longer start; costs one pass over all of them."""


Event = (
    GrantReceived
    | BadOrderReceived
    | Distrusted
    | StopReceived
    | LeaseAnswered
    | AttemptStarted
    | AttemptComputed
    | AttemptSucceeded
    | AttemptFailed
    | AttemptStopped
    | PayloadRefused
    | ModelProgressed
    | ModelLoaded
    | ModelFailed
    | ModelEvicted
    | HostLost
    | ReportAcknowledged
    | AdvertDue
    | DrainRequested
    | Restarted
    | Ticked
)
