"""A whole federation in virtual time: the production core of the coordinator, sites that keep the protocol, and faults.

Everything is drawn from one seed. Messages are lost, doubled, delayed and reordered; sites crash and come back with a new
boot, fall silent, decline, lose runners; the coordinator crashes before its record, between record and send, and between
two sends, and recovers from what was recorded; its own link breaks. After every decision the invariants are checked.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.core import decide as core
from coordinator.core import events as ev
from coordinator.core.decision import Outgoing, PublishRefusal, PurgeJob, Reply, SendGrant, SendStop
from coordinator.core.invariants import broken_by
from coordinator.core.state import (
    AttemptChanged,
    Change,
    JobChanged,
    MeshState,
    Policy,
    SiteChanged,
    TermChanged,
    evolve,
)
from edif_mesh.domain.attempt import AttemptStatus, Blame, Receipt
from edif_mesh.domain.ids import AttemptNumber, BootId, Digest, Epoch, FederationId, JobId, KeyId, SiteId, job_id
from edif_mesh.domain.job import Failure, JobStatus, Limits
from edif_mesh.domain.room import Plan, Resident, plan_room
from edif_mesh.domain.site import ModelOffer, ModelRef, ModelState, SiteStatus, Versions
from edif_mesh.wire.messages import (
    Advert,
    AttemptRef,
    Grant,
    LeaseRenewed,
    Lender,
    Manifest,
    Order,
    PayloadRef,
    Report,
    ReportReceived,
    StopAttempt,
)

T0 = 1_800_000_000_000
LEASE_MS, ADVERT_MS = 30_000, 5_000
MODELS = ("m", "m1", "m2", "m3")
"""Of one unit of memory each; jobs want the first most."""
MODELS_BYTES, RESIDENCY_MS = 2, 5_000
"""What every site gives to models, and how long a loaded one stays."""
HEALED_BOUND_MS = 400_000
"""Once nothing fails any more, every job must have ended by then."""
Key = tuple[JobId, AttemptNumber]


class Violation(AssertionError):
    """An invariant was broken; the text has the seed, the step and what happened last."""


@dataclass
class Held:
    """One attempt at a site."""

    grant: Grant
    model: str
    lease_until_ms: int
    accepted_at_ms: int
    sequence: int = 0
    running: bool = True
    report: Report | None = None
    manifest: Manifest | None = None


@dataclass
class Site:
    """A site that keeps the protocol: journal and outbox survive its crashes, runs do not."""

    name: SiteId
    slots: int
    up: bool = True
    reachable: bool = True
    boots: int = 1
    adverts: int = 0
    highest_epoch: int = 0
    seen: set[tuple[Digest, AttemptNumber]] = field(default_factory=set)
    held: dict[Key, Held] = field(default_factory=dict)
    status: SiteStatus = SiteStatus.ACTIVE
    loaded: dict[str, int] = field(default_factory=lambda: {"m": 0})
    """When each model that is in memory was loaded."""
    loading: set[str] = field(default_factory=set)
    dropped: tuple[JobId, ...] = ()

    def residents(self, now_ms: int) -> list[Resident]:
        """What takes memory, and why it must stay."""
        busy = {held.model for held in self.held.values() if held.running}
        young = {name for name, at in self.loaded.items() if now_ms - at < RESIDENCY_MS}
        stay = busy | young | self.loading
        names = sorted({*self.loaded, *self.loading})
        return [Resident(n, 1, "in use" if n in stay else "", self.loaded.get(n, now_ms)) for n in names]

    def offers(self) -> tuple[ModelOffer, ...]:
        """The catalogue as it is advertised."""
        return tuple(
            ModelOffer(
                name, "r", "text-generation", "float32",
                ModelState.LOADED if name in self.loaded else ModelState.LOADING if name in self.loading else ModelState.LOADABLE,
                1, 1, memory_bytes=1, evictable_at_ms=self.loaded.get(name, -RESIDENCY_MS) + RESIDENCY_MS,
            )
            for name in MODELS
        )  # fmt: skip

    @property
    def boot(self) -> BootId:
        return BootId(f"{self.name}-{self.boots}")


class World:
    """One seeded run."""

    def __init__(self, seed: int, *, sites: int = 4) -> None:
        self.seed, self.random = seed, random.Random(seed)
        self.now_ms, self.steps = T0, 0
        self.counts: Counter[str] = Counter()
        self.trace = hashlib.sha256()
        self.recent: deque[str] = deque(maxlen=40)
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self.faults = True
        self.policy = Policy(lease_ms=LEASE_MS)
        self.record: dict[object, Change] = {}
        self.epoch = Epoch(0)
        self.state = MeshState(FederationId("sim"), self.policy)
        self.up, self.linked = True, True
        self.sites = {SiteId(f"site-{n}"): Site(SiteId(f"site-{n}"), slots=1 + n % 3) for n in range(sites)}
        self.orders: dict[JobId, Order] = {}
        self.refused: set[JobId] = set()
        self.purging: set[JobId] = set()
        self.committed: dict[JobId, tuple[int, str]] = {}
        self.starts: set[tuple[SiteId, Digest, AttemptNumber]] = set()
        self._start_term()
        for site in self.sites.values():
            self._after(self.random.randint(0, ADVERT_MS), lambda s=site: self._advert_loop(s))
            self._after(1_000, lambda s=site: self._site_tick(s))
        self._after(250, self._tick)
        self._after(100, self._client)
        self._after(3_000, self._misfortune)

    # ------------------------------------------------------------------------------------------------------ running

    def run(self, steps: int) -> None:
        """Run so many decisions with faults."""
        while self.steps < steps:
            self._next()

    def heal_and_finish(self) -> None:
        """Stop all faults; every order must reach its end within the stated bound."""
        self.faults = False
        for site in self.sites.values():
            site.reachable, site.status = True, SiteStatus.ACTIVE
            if not site.up:
                self._restart(site)
        if not self.linked:
            self._link(True)
        if not self.up:
            self._recover()
        end = self.now_ms + HEALED_BOUND_MS
        while self.now_ms < end and (self._open_jobs() or self._undeleted()):
            self._next()
        if undeleted := self._undeleted():
            self._fail([f"{undeleted[0]} was not deleted after healing: {self.state.jobs[undeleted[0]].keeping}"])
        if stuck := self._open_jobs():
            self._fail(
                [
                    f"{len(stuck)} jobs did not end after healing: {[(j, self.state.jobs[j].status) if j in self.state.jobs else j for j in stuck[:3]]}"
                ]
            )

    def _undeleted(self) -> list[JobId]:
        """Jobs whose deletion should be done: nobody uses their chunks."""
        return [job for job in self.state.deleting if not self.state.borrowed.get(job)]

    def _open_jobs(self) -> list[JobId]:
        return [
            job
            for job in self.orders
            if job not in self.refused and (job not in self.state.jobs or not self.state.jobs[job].terminal)
        ]

    def _next(self) -> None:
        self.now_ms, _, action = heapq.heappop(self._due)
        action()

    def _after(self, delay_ms: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now_ms + delay_ms, next(self._number), action))

    def _chance(self, probability: float) -> bool:
        return self.faults and self.random.random() < probability

    def _post(self, action: Callable[[], None], site: Site | None = None) -> None:
        """Send something over the network."""
        if self._chance(0.03):
            self.counts["lost"] += 1
            return
        for _ in range(2 if self._chance(0.03) else 1):
            delay = self.random.randint(1, 20) if not self._chance(0.05) else self.random.randint(20, 8_000)
            self._after(delay, lambda: action() if site is None or (site.reachable and self.linked) else None)

    # -------------------------------------------------------------------------------------------------- coordinator

    def feed(self, event: ev.Event) -> None:
        """Have the coordinator take one event, as its shell does: decide, record, apply, send."""
        if not self.up:
            return
        self.steps += 1
        kind = type(event).__name__
        self.counts[kind] += 1
        try:
            decision = core.decide(event, self.state, self.now_ms)
        except Exception as error:
            self._fail([f"{kind} raised {error!r}"])
            return
        self.recent.append(f"{self.now_ms - T0} {kind} -> {[type(c).__name__ for c in decision.record][:6]}")
        self.trace.update(f"{self.now_ms}{kind}{len(decision.record)}{len(decision.send)}".encode())
        if broken := broken_by(decision, self.state):
            self._fail(broken)
        if decision.record and self._chance(0.004):
            self._crash("before record")
            return
        for change in decision.record:
            self._keep(change)
        core.apply(self.state, event, decision.record, self.now_ms)
        self._check_commits()
        for outgoing in decision.send:
            if self._chance(0.004):
                self._crash("between record and send")
                return
            self._send(outgoing)

    def _keep(self, change: Change) -> None:
        match change:
            case JobChanged(record):
                self.record[record.job] = change
            case AttemptChanged(record):
                self.record[record.job, record.attempt] = change
            case SiteChanged(record, durable):
                if durable:
                    self.record[record.site] = change
            case TermChanged(epoch):
                if epoch <= self.epoch:
                    self._fail([f"the epoch fell from {self.epoch} to {epoch}"])
                self.epoch = epoch
            case _:
                pass

    def _crash(self, when: str) -> None:
        self.counts[f"coordinator crashed {when}"] += 1
        self.up = False
        self._after(self.random.randint(500, 40_000), self._recover)

    def _recover(self) -> None:
        if self.up:
            return
        before = self.state
        self.state, self.up = MeshState(FederationId("sim"), self.policy), True
        for change in sorted(self.record.values(), key=lambda change: isinstance(change, SiteChanged)):
            evolve(self.state, change)  # sites last, as the shell does
        evolve(self.state, TermChanged(self.epoch))
        same = "jobs", "kept", "kept_bytes", "kept_bytes_at", "borrowed", "deleting"
        if set(self.state.active) != set(before.active) or any(
            getattr(self.state, name) != getattr(before, name) for name in same
        ):
            self._fail(["what was recovered is not what was decided"])
        self._start_term()

    def _start_term(self) -> None:
        self.feed(ev.TermStarted(Epoch(self.epoch + 1)))

    def _tick(self) -> None:
        self._after(250, self._tick)
        self.feed(ev.Ticked())

    def _check_commits(self) -> None:
        for job in [j for j in self.state.jobs.values() if j.status is JobStatus.SUCCEEDED]:
            told = (int(job.attempt), str(job.manifest))
            if self.committed.setdefault(job.job, told) != told:
                self._fail([f"{job.job} was committed twice"])
            attempt = self.state.attempts.get((job.job, job.attempt))
            if attempt is None or attempt.status is not AttemptStatus.SUCCEEDED or attempt.site != job.result_site:
                self._fail([f"{job.job} was committed for an attempt that had not succeeded"])

    def _send(self, outgoing: Outgoing) -> None:
        match outgoing:
            case SendGrant(grant, _):
                site = self.sites[grant.site]
                if not site.up or not site.reachable:
                    self._after(2, lambda: self.feed(ev.GrantUndelivered(grant.job, grant.attempt, grant.site)))
                else:
                    self._post(lambda: self._granted(site, grant), site)
            case SendStop(stop):
                site = self.sites[stop.site]
                self._post(lambda: self._stopped(site, stop), site)
            case Reply(reply_to, message):
                site = self.sites.get(SiteId(reply_to.partition("|")[0]))
                if site is None:
                    return
                if isinstance(message, LeaseRenewed):
                    sent_at = int(reply_to.partition("|")[2])
                    self._post(lambda: self._renewed(site, message, sent_at), site)
                elif isinstance(message, ReportReceived):
                    self._post(lambda: self._acknowledged(site, message), site)
            case PublishRefusal(job, _):
                self.refused.add(job)
            case PurgeJob(job) if job not in self.purging:
                self.purging.add(job)
                self._after(self.random.randint(2, 3_000), lambda: self._purge(job))
            case _:
                pass

    # -------------------------------------------------------------------------------------------------------- sites

    def _granted(self, site: Site, grant: Grant) -> None:
        if not site.up or grant.epoch < site.highest_epoch:
            return
        site.highest_epoch = grant.epoch
        key, pair = (grant.job, grant.attempt), (grant.order_digest, grant.attempt)
        if pair in site.seen and key not in site.held:
            return
        boot = site.boot
        self._post(lambda: self.feed(ev.GrantAnswered(grant.job, grant.attempt, site.name, boot)), site)
        if pair in site.seen:
            return
        site.seen.add(pair)
        model = self.orders[grant.job].model.repo_id
        plan = self._plan(site, model)
        held = Held(grant, model, self.now_ms + LEASE_MS, self.now_ms)
        site.held[key] = held
        if not plan.fits:
            self.counts["no room for the model"] += 1
            self._report(site, held, AttemptStatus.DECLINED, Failure("no_room", "declined"))
            return
        if sum(h.running for h in site.held.values()) > site.slots or self._chance(0.03):
            self._report(site, held, AttemptStatus.DECLINED, Failure("no_free_slot", "declined"))
            return
        start = (site.name, *pair)
        if start in self.starts:
            self._fail([f"{key} ran twice at {site.name}"])
        self.starts.add(start)
        self.counts["started"] += 1
        if model in site.loaded:
            self._runs(site, key, boot)
            return
        self._report(site, held, AttemptStatus.LOADING)
        if model not in site.loading:
            for gone in plan.evict:
                self.counts["evicted"] += 1
                del site.loaded[gone]
            site.loading.add(model)
            if len(site.loaded) + len(site.loading) > MODELS_BYTES:
                self._fail([f"{site.name} holds {sorted(site.loaded)} and loads {sorted(site.loading)}"])
            self._after(self.random.choice((100, 1_000, 8_000)), lambda: self._loaded(site, model, boot))

    def _plan(self, site: Site, model: str) -> Plan:
        """What must go before the model can be loaded at the site; nothing for one that is there."""
        there = site.residents(self.now_ms)
        need = 0 if model in site.loaded or model in site.loading else 1
        return plan_room(need, MODELS_BYTES, there) if need else Plan()

    def _loaded(self, site: Site, model: str, boot: BootId) -> None:
        if not site.up or site.boot != boot:
            return
        site.loading.discard(model)
        site.loaded[model] = self.now_ms
        for key, held in list(site.held.items()):
            if held.running and held.model == model:
                self._runs(site, key, boot)
        self._advert(site)

    def _runs(self, site: Site, key: Key, boot: BootId) -> None:
        self._report(site, site.held[key], AttemptStatus.RUNNING)
        self._after(self.random.choice((50, 500, 2_000, 20_000)), lambda: self._ended(site, key, boot))

    def _ended(self, site: Site, key: Key, boot: BootId) -> None:
        held = site.held.get(key)
        if not site.up or site.boot != boot or held is None or not held.running:
            return
        if self._chance(0.03):
            self._report(site, held, AttemptStatus.FAILED, Failure("runner_crashed", "crash"), Blame.RUNNER)
        elif self._chance(0.03):
            self._report(site, held, AttemptStatus.FAILED, Failure("host_lost", "host"), Blame.SITE)
        elif int(key[0][-2:], 16) % 10 == 0:
            self._report(site, held, AttemptStatus.FAILED, Failure("user_error", "your error"), Blame.USER)
        else:
            self._report(site, held, AttemptStatus.SUCCEEDED)

    def _report(
        self, site: Site, held: Held, status: AttemptStatus, failure: Failure | None = None, blame: Blame | None = None
    ) -> None:
        grant = held.grant
        job = self.state.jobs.get(grant.job)
        if held.running and self.up and job is not None and job.keeping is not None:
            if job.keeping.deleted_at_ms is not None and not job.keeping.deleting:
                self._fail([f"{grant.job} counts as deleted, and {site.name} still stored something of it"])
        held.sequence += 1
        done = status is AttemptStatus.SUCCEEDED
        held.manifest = (
            Manifest(
                grant.order_digest,
                grant.job,
                grant.attempt,
                site.name,
                1,
                1,
                1,
                grant.order_digest,
                self.now_ms,
                Receipt(),
                lenders=self._lenders(site, grant),
            )
            if done
            else None
        )
        held.report = Report(
            site.name, site.boot, grant.job, grant.attempt, held.sequence, status, self.now_ms, grant.order_digest,
            failure=failure, blame=blame, manifest=f"{site.name}/{grant.attempt}" if done else None,
            receipt=Receipt(wall_ms=100) if status.terminal else None, epoch=grant.epoch,
        )  # fmt: skip
        held.running = not status.terminal
        self._send_report(site, held)

    def _send_report(self, site: Site, held: Held) -> None:
        report, manifest = held.report, held.manifest
        if report is not None and site.up:
            self._post(lambda: self.feed(ev.SiteReported(report, manifest, f"{site.name}|0")), site)

    def _acknowledged(self, site: Site, answer: ReportReceived) -> None:
        held = site.held.get((answer.job, answer.attempt))
        if site.up and held is not None and held.report is not None and answer.sequence >= held.report.sequence:
            if held.report.status.terminal:
                del site.held[answer.job, answer.attempt]
            else:
                held.report = None

    def _stopped(self, site: Site, stop: StopAttempt) -> None:
        held = site.held.get((stop.job, stop.attempt))
        if site.up and held is not None and held.running and stop.epoch >= site.highest_epoch:
            self._report(site, held, AttemptStatus.CANCELLED)

    def _lenders(self, site: Site, grant: Grant) -> tuple[Lender, ...]:
        """Some results use chunks of an earlier one of their site, which may have been deleted meanwhile."""
        if grant.attempt > 1 or self.random.random() < 0.6:
            return ()
        ended = [j for j in self.state.jobs.values() if j.result_site == site.name and j.job not in site.dropped]
        return tuple(Lender(job.job, job.attempt) for job in self.random.sample(ended, min(1, len(ended))))

    def _purge(self, job: JobId) -> None:
        """The broker deletes a job's chunks, unless that request was lost."""
        self.purging.discard(job)
        if self.random.random() < 0.2 and self.faults:
            return
        users = [kept.job for kept in self.state.kept.values() if job in kept.lenders and self.now_ms < kept.until_ms]
        if users:
            self._fail([f"the chunks of {job} were deleted, and {users[0]} still uses them"])
        if job in self.state.kept:
            self._fail([f"the chunks of {job} were deleted, and nobody had asked for it"])
        self.feed(ev.JobPurged(job))

    def _renewed(self, site: Site, answer: LeaseRenewed, sent_at_ms: int) -> None:
        if not site.up or answer.epoch < site.highest_epoch:
            return
        named = {(a.job, a.attempt) for a in answer.attempts}
        for key, held in list(site.held.items()):
            if key in named:
                held.lease_until_ms = max(held.lease_until_ms, sent_at_ms + answer.lease_ms)
            elif held.running and held.accepted_at_ms < sent_at_ms:
                self._report(site, held, AttemptStatus.RELEASED)
        running = {job for (job, _), held in site.held.items() if held.running}
        site.dropped = tuple(job for job in answer.drop if job not in running)

    def _advert_loop(self, site: Site) -> None:
        self._after(ADVERT_MS, lambda: self._advert_loop(site))
        self._advert(site)

    def _advert(self, site: Site) -> None:
        if not site.up:
            return
        site.adverts += 1
        advert = Advert(
            site=site.name, boot=site.boot, sequence=site.adverts, issued_at_ms=self.now_ms, valid_ms=LEASE_MS, status=site.status,
            country="DE", slots=site.slots, free_slots=site.slots, memory_bytes=64 << 30, free_memory_bytes=64 << 30, devices=(),
            models=site.offers(), models_bytes=MODELS_BYTES, versions=Versions(nnsight="0.8.1"),
            limits=Limits(), sandbox="namespaced" if site is next(iter(self.sites.values())) else "base",
            attempts=tuple(AttemptRef(*key, AttemptStatus.RUNNING) for key in site.held), dropped=site.dropped,
        )  # fmt: skip
        sent_at = self.now_ms
        self._post(lambda: self.feed(ev.AdvertReceived(advert, f"{site.name}|{sent_at}")), site)

    def _site_tick(self, site: Site) -> None:
        self._after(1_000, lambda: self._site_tick(site))
        for held in list(site.held.values()):
            if site.up and held.running and self.now_ms >= held.lease_until_ms:
                self.counts["fenced itself"] += 1
                self._report(site, held, AttemptStatus.RELEASED)
            elif site.up:
                self._send_report(site, held)

    # ------------------------------------------------------------------------------------------------------- faults

    def _misfortune(self) -> None:
        self._after(self.random.randint(500, 6_000), self._misfortune)
        if not self.faults:
            return
        site = self.random.choice(list(self.sites.values()))
        match self.random.randrange(10):
            case 0 | 1 if site.up:
                self.counts["site crashed"] += 1
                site.up = False
                if self.random.random() < 0.7:
                    self._after(30, lambda: self.feed(ev.SiteDisconnected(site.name)))
                self._after(self.random.randint(100, 60_000), lambda: self._restart(site))
            case 2:
                self.counts["cut off"] += 1
                site.reachable = False
                self._after(self.random.randint(1_000, 90_000), lambda: setattr(site, "reachable", True))
            case 3:
                site.status = self.random.choice((SiteStatus.ACTIVE, SiteStatus.CORDONED, SiteStatus.ACTIVE))
            case 4 if self.up:
                self._crash("at rest")
            case 5 if self.linked:
                self._link(False)
                self._after(self.random.randint(500, 60_000), lambda: self._link(True))
            case 6:
                self.feed(ev.SiteDisconnected(site.name))
            case 7 if jobs := self._open_jobs() if self.random.random() < 0.8 else list(self.orders):
                job = self.random.choice(jobs)
                self.counts["cancelled"] += 1
                self.feed(ev.CancelRequested(job, KeyId("k"), "no need"))
            case 8 if site.up and (running := [key for key, held in site.held.items() if held.running]):
                # Before the stop arrives: its next life reports an attempt lost that the coordinator has ended otherwise.
                self.counts["cancelled, then crashed"] += 1
                self.feed(ev.CancelRequested(self.random.choice(running)[0], KeyId("k"), "no need"))
                site.up = False
                self._after(self.random.randint(100, 60_000), lambda: self._restart(site))
            case 9 if self.orders:
                job = self.random.choice(list(self.orders))
                self.counts["deletion asked"] += 1
                self.feed(ev.DeletionAsked(job, KeyId("k"), ""))
            case _:
                pass

    def _restart(self, site: Site) -> None:
        if site.up:
            return
        site.up, site.boots = True, site.boots + 1
        site.loaded, site.loading, site.dropped = {"m": self.now_ms - RESIDENCY_MS}, set(), ()
        for held in list(site.held.values()):
            if held.running:
                held.sequence += 1000
                self._report(site, held, AttemptStatus.FAILED, Failure("agent_restarted", "restarted"), Blame.SITE)
        self._advert(site)

    def _link(self, connected: bool) -> None:
        if connected != self.linked:
            self.counts["own link"] += 1
            self.linked = connected
            self.feed(ev.LinkReturned() if connected else ev.LinkLost())

    def _client(self) -> None:
        self._after(self.random.randint(200, 3_000), self._client)
        waiting = [job for job in self.orders if job not in self.refused and job not in self.state.jobs]
        if self.faults and len(self._open_jobs()) < 30:
            job = job_id(self.now_ms, self.random.getrandbits(48))
            expires = self.now_ms + (86_400_000 if self.random.random() < 0.9 else 20_000)
            digest = Digest(hashlib.sha256(job.encode()).hexdigest())
            self.orders[job] = Order(
                FederationId("sim"), job, "n", self.now_ms, self.now_ms, expires, PayloadRef(digest, 1),
                ModelRef(self.random.choice((*MODELS, *["m"] * 8)) if self.random.random() < 0.97 else "unknown"), Versions(nnsight="0.8.1"),
                limits=Limits(memory_bytes=1 << 20), max_attempts=self.random.choice((2, 8)),
                sandbox="namespaced" if digest[0] in "012" else "",
            )  # fmt: skip
            waiting.append(job)
        for job in waiting:  # the stream delivers an order until it is recorded
            order = self.orders[job]
            event = ev.OrderReceived(order, order.payload.digest, "envelope", KeyId("k"))
            if self.up and self.linked:
                self.feed(event)
            if self._chance(0.05):
                self.feed(event)

    def _fail(self, what: list[str]) -> None:
        story = "\n  ".join(self.recent)
        raise Violation(f"seed {self.seed}, step {self.steps}: {'; '.join(what)}\n  {story}")


def run(seed: int, steps: int) -> World:
    """Run one world for so many decisions with faults, heal it, and see everything end."""
    world = World(seed, sites=2 + seed % 5)
    world.run(steps)
    world.heal_and_finish()
    return world
