"""Builders that hide what a test does not care about, and a desk at which the coordinator's core decides in virtual time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.core import events as ev
from coordinator.core.decide import apply, decide
from coordinator.core.decision import Decision, Outgoing, PublishRefusal, Reply, SendGrant, SendStop
from coordinator.core.state import AttemptRecord, Change, JobRecord, MeshState, Policy
from edif_mesh.domain.attempt import AttemptStatus, Blame, Receipt
from edif_mesh.domain.ids import AttemptNumber, BootId, Digest, Epoch, FederationId, JobId, KeyId, SiteId, job_id
from edif_mesh.domain.job import Failure, Limits
from edif_mesh.domain.site import ModelOffer, ModelRef, ModelState, SiteStatus, Versions
from edif_mesh.wire.messages import Advert, AttemptRef, JobSnapshot, Manifest, Order, PayloadRef, Refusal, Report

T0 = 1_800_000_000_000
"""The instant at which virtual time begins."""
ALICE, BOB = KeyId("a" * 32), KeyId("b" * 32)
GPT2 = "gpt2"


def a_job(number: int = 1) -> JobId:
    """Return the id of the test's job `number`."""
    return job_id(T0, number)


def an_order(number: int = 1, **fields: Any) -> Order:
    """Return an order that every site of `an_advert` takes."""
    order = Order(
        federation=FederationId("test"),
        job=a_job(number),
        nonce=f"n{number}",
        issued_at_ms=T0,
        not_before_ms=T0,
        expires_at_ms=T0 + 86_400_000,
        payload=PayloadRef(Digest("1" * 64), 1000),
        model=ModelRef(GPT2),
        client=Versions(nnsight="0.8.1"),
    )
    return replace(order, **fields)


def an_offer(repo_id: str = GPT2, **fields: Any) -> ModelOffer:
    """Return an offer of a loaded model."""
    offer = ModelOffer(repo_id, "r" * 40, "text-generation", "float32", ModelState.LOADED, 1 << 29, 4000)
    return replace(offer, **fields)


def an_advert(site: str = "ansbach", sequence: int = 1, **fields: Any) -> Advert:
    """Return the advert of an active site with two slots, 8 GiB for runners, and gpt2 loaded."""
    advert = Advert(
        site=SiteId(site),
        boot=BootId(f"{site}-boot-1"),
        sequence=sequence,
        issued_at_ms=T0,
        valid_ms=30_000,
        status=SiteStatus.ACTIVE,
        country="DE",
        slots=2,
        free_slots=2,
        memory_bytes=8 << 30,
        free_memory_bytes=8 << 30,
        devices=(),
        models=(an_offer(),),
        versions=Versions(nnsight="0.8.1"),
        limits=Limits(),
        attempts=(),
        sandbox="seccomp",
    )
    return replace(advert, **fields)


@dataclass
class Desk:
    """The coordinator's core at work: every event is decided, recorded and applied, as the shell does it."""

    policy: Policy = field(default_factory=Policy)
    now_ms: int = T0
    record: list[Change] = field(default_factory=list)
    sent: list[Outgoing] = field(default_factory=list)
    _sequences: dict[str, int] = field(default_factory=dict)
    _said: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = MeshState(FederationId("test"), self.policy)
        self.happens(ev.TermStarted(Epoch(1)))
        self.passes(self.policy.suspect_ms)

    def happens(self, event: ev.Event) -> Decision:
        """Decide `event` now, record, apply, and return the decision."""
        decision = decide(event, self.state, self.now_ms)
        self.record += decision.record
        apply(self.state, event, decision.record, self.now_ms)
        self.sent += decision.send
        return decision

    def passes(self, ms: int, *alive: str, step_ms: int = 1000) -> None:
        """Let time pass with its ticks, and with an advert every 5 s of each site in `alive`, listing what it holds."""
        end = self.now_ms + ms
        while self.now_ms < end:
            before = self.now_ms
            self.now_ms = min(end, self.now_ms + step_ms)
            if before // 5000 != self.now_ms // 5000:
                for site in alive:
                    self.advert(site, attempts=self.held_at(site))
            self.happens(ev.Ticked())

    def held_at(self, site: str) -> tuple[AttemptRef, ...]:
        """Return what a well-behaved site lists: the attempts that it has taken and that have not ended."""
        found = [a for a in self.state.attempts.values() if a.site == site and a.answered and not a.status.terminal]
        return tuple(AttemptRef(a.job, a.attempt, a.status) for a in found)

    def advert(self, site: str, **fields: Any) -> Decision:
        """The site adverts, with its next sequence number unless one is given, and otherwise as it last did."""
        fields.setdefault("sequence", self._sequences.get(site, 0) + 1)
        self._sequences[site] = fields["sequence"]
        fields = {**self._said.get(site, {}), "issued_at_ms": self.now_ms, **fields}
        self._said[site] = {k: v for k, v in fields.items() if k not in ("sequence", "issued_at_ms", "attempts")}
        return self.happens(ev.AdvertReceived(an_advert(site, **fields), "advert"))

    def orders(self, number: int = 1, owner: KeyId = ALICE, digest: str = "", **fields: Any) -> JobId:
        """The owner's order arrives."""
        order = an_order(number, **fields)
        self.happens(ev.OrderReceived(order, Digest(digest or f"{number:064x}"), f"envelope {number}", owner))
        return order.job

    def accepts(self, job: JobId, boot: str = "") -> AttemptRecord:
        """The site of the job's current attempt takes the grant."""
        attempt = self.attempt(job)
        name = BootId(boot or f"{attempt.site}-boot-1")
        self.happens(ev.GrantAnswered(job, attempt.attempt, attempt.site, name))
        return self.attempt(job)

    def reports(
        self,
        job: JobId,
        status: AttemptStatus,
        *,
        number: int | None = None,
        sequence: int | None = None,
        **fields: Any,
    ) -> Decision:
        """The site of attempt `number` (default: the current one) reports; a success brings its manifest."""
        attempt = self.attempt(job, number)
        report = Report(
            site=attempt.site,
            boot=attempt.boot or BootId(f"{attempt.site}-boot-1"),
            job=job,
            attempt=attempt.attempt,
            sequence=attempt.sequence + 1 if sequence is None else sequence,
            status=status,
            issued_at_ms=self.now_ms,
            order_digest=self.job(job).order_digest,
            manifest=f"manifest of {attempt.site}" if status is AttemptStatus.SUCCEEDED else None,
            receipt=Receipt(wall_ms=1000) if status.terminal else None,
            epoch=attempt.epoch,
        )
        manifest = a_manifest(self.job(job), attempt) if status is AttemptStatus.SUCCEEDED else None
        manifest = fields.pop("opened", manifest)
        return self.happens(ev.SiteReported(replace(report, **fields), manifest, "report"))

    def fails(self, job: JobId, blame: Blame, text: str = "It broke.") -> Decision:
        """The current attempt fails by somebody's fault."""
        failure = Failure("failed", text)
        return self.reports(job, AttemptStatus.FAILED, failure=failure, blame=blame)

    def job(self, job: JobId) -> JobRecord:
        """Return the job's record."""
        return self.state.jobs[job]

    def attempt(self, job: JobId, number: int | None = None) -> AttemptRecord:
        """Return the job's attempt `number`, by default the current one."""
        return self.state.attempts[(job, AttemptNumber(number or self.job(job).attempt))]

    def sees(self, job: JobId, *, by: KeyId = ALICE, explain: bool = False) -> JobSnapshot:
        """Return the answer to a researcher's question about the job."""
        (reply,) = replies(self.happens(ev.JobAsked(job, by, explain, "ask")))
        assert isinstance(reply, JobSnapshot)
        return reply


def a_manifest(job: JobRecord, of: AttemptRecord, **fields: Any) -> Manifest:
    """Return the manifest that fits the attempt."""
    manifest = Manifest(
        job.order_digest, job.job, of.attempt, of.site, 100, 100, 1, Digest("2" * 64), T0, Receipt(1000)
    )
    return replace(manifest, **fields)


def replies(decision: Decision) -> list[object]:
    """Return the answers that a decision sends."""
    return [item.message for item in decision.send if isinstance(item, Reply)]


def grants(decision: Decision) -> list[tuple[str, int]]:
    """Return site and attempt number of every grant that a decision sends."""
    return [(item.grant.site, item.grant.attempt) for item in decision.send if isinstance(item, SendGrant)]


def stops(decision: Decision) -> list[tuple[str, str]]:
    """Return site and reason of every stop that a decision sends."""
    return [(item.stop.site, item.stop.reason) for item in decision.send if isinstance(item, SendStop)]


def refusals(sent: list[Outgoing]) -> list[Refusal]:
    """Return the refused orders among what was sent."""
    return [item.refusal for item in sent if isinstance(item, PublishRefusal)]
