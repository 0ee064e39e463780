"""Whatever happens in whatever order, the core keeps its promises after every single event."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import events as ev
from coordinator.core.decision import SendGrant
from coordinator.core.state import AttemptChanged, Audited, JobChanged, MeshState, evolve
from edif_mesh.domain.attempt import AttemptStatus, Blame
from edif_mesh.domain.ids import BootId, FederationId, SiteId
from edif_mesh.domain.job import JobStatus
from tests.builders import ALICE, BOB, Desk, a_job

SITES = ("ansbach", "bamberg", "coburg")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ("order", "advert", "bare", "reboot", "accept", "report", "late", "fail", "cancel", "drop", "gone", "time")
        ),
        st.integers(0, 5),
        st.integers(0, 9),
    ),
    min_size=15,
    max_size=60,
)


def step(desk: Desk, what: str, which: int, how: int) -> None:
    """Let one thing happen, if it can."""
    site, job = SITES[which % 3], a_job(which)
    record = desk.state.jobs.get(job)
    statuses = list(AttemptStatus)
    match what:
        case "order":
            desk.orders(which, owner=(ALICE, BOB)[which % 2], max_attempts=3)
        case "advert":
            desk.advert(site, attempts=desk.held_at(site))
        case "bare":
            desk.advert(site)
        case "reboot":
            desk.now_ms += 1
            desk.advert(site, boot=BootId(f"{site}-boot-{desk.now_ms}"))
        case "drop":
            desk.happens(ev.SiteDisconnected(SiteId(site)))
        case "time":
            desk.passes(1000 * 3**how if how < 4 else 700)
        case "cancel" if record is not None:
            desk.happens(ev.CancelRequested(job, record.owner, "x", "ask"))
        case _ if what == "cancel" or record is None or record.attempt == 0:
            pass
        case "accept":
            desk.accepts(job)
        case "report":
            desk.reports(job, statuses[how % len(statuses)])
        case "late":
            desk.reports(job, statuses[how % len(statuses)], number=1, sequence=how)
        case "fail":
            desk.fails(job, list(Blame)[how % 3])
        case "gone":
            attempt = desk.attempt(job)
            desk.happens(ev.GrantUndelivered(job, attempt.attempt, attempt.site))
        case _:
            raise AssertionError(what)


def check(desk: Desk, committed: dict[str, str | None]) -> None:
    """Check the rules that hold after every event."""
    state = desk.state
    assert [key[2] for key in state.queue] == [j for _, _, j in sorted(state.queue)]
    assert {key[2] for key in state.queue} == {j.job for j in state.jobs.values() if j.status is JobStatus.QUEUED}
    assert sorted(key for line in state.lines.values() for key in line) == state.queue
    assert all(state.lines.values())
    for site in state.sites.values():
        held = [a for a in state.attempts.values() if a.site == site.site and a.active]
        assert len(held) <= site.advert.slots
    for job in state.jobs.values():
        assert job.attempt <= job.order.max_attempts
        mine = [a for a in state.attempts.values() if a.job == job.job]
        assert sorted(a.attempt for a in mine) == list(range(1, job.attempt + 1))
        assert all(a.status.terminal for a in mine if a.attempt < job.attempt or job.terminal)
        assert (job.status in (JobStatus.PLACED, JobStatus.RUNNING)) == any(not a.status.terminal for a in mine)
        if job.status is JobStatus.SUCCEEDED:
            assert committed.setdefault(job.job, job.manifest) == job.manifest
            assert [a.attempt for a in mine if a.status is AttemptStatus.SUCCEEDED] == [job.attempt]
        else:
            assert job.job not in committed


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_the_rules_hold_after_every_event(steps: list[tuple[str, int, int]]) -> None:
    desk, committed = Desk(), dict[str, str | None]()
    for site in SITES:
        desk.advert(site)
    ended: dict[str, JobStatus] = {}
    for what, which, how in steps:
        step(desk, what, which, how)
        check(desk, committed)
        for job in desk.state.jobs.values():
            assert ended.get(job.job, job.status) is job.status, "terminal is final"
            if job.terminal:
                ended[job.job] = job.status
    granted = [(i.grant.job, i.grant.attempt, i.grant.site) for i in desk.sent if isinstance(i, SendGrant)]
    assert len({(job, number) for job, number, _ in granted}) == len(set(granted)), "an attempt goes to one site"
    _fold_equals(desk)
    _audit_is_exact(desk)


def _fold_equals(desk: Desk) -> None:
    """What is recovered from the record is what was known."""
    again = MeshState(FederationId("test"), desk.policy)
    for change in desk.record:
        evolve(again, change)
    assert (again.jobs, again.attempts, again.sites) == (desk.state.jobs, desk.state.attempts, desk.state.sites)
    assert (again.queue, again.lines, again.active) == (desk.state.queue, desk.state.lines, desk.state.active)
    assert again.served_s == desk.state.served_s


def _audit_is_exact(desk: Desk) -> None:
    """Every end of a job or attempt has one line in the audit log."""
    jobs = [c.record for c in desk.record if isinstance(c, JobChanged)]
    attempts = [c.record for c in desk.record if isinstance(c, AttemptChanged)]
    lines = [c for c in desk.record if isinstance(c, Audited)]
    for job in {j.job for j in jobs if j.terminal}:
        status = desk.job(job).status.value.lower()
        assert len([x for x in lines if x.job == job and x.what == f"job {status}"]) == 1
    for key in {(a.job, a.attempt) for a in attempts if a.status.terminal}:
        status = desk.state.attempts[key].status.value.lower()
        assert len([x for x in lines if (x.job, x.attempt, x.what) == (*key, f"attempt {status}")]) == 1


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_once_the_sites_are_well_every_job_ends(steps: list[tuple[str, int, int]]) -> None:
    desk = Desk()
    for site in SITES:
        desk.advert(site)
    for what, which, how in steps:
        step(desk, what, which, how)
    for _ in range(60):
        if all(job.terminal for job in desk.state.jobs.values()):
            break
        desk.passes(5000, *SITES)
        for attempt in list(desk.state.attempts.values()):
            if not attempt.status.terminal and desk.job(attempt.job).attempt == attempt.attempt:
                desk.accepts(attempt.job)
                desk.reports(attempt.job, AttemptStatus.SUCCEEDED)
    assert all(job.terminal for job in desk.state.jobs.values())
