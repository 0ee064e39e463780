"""The state of a new term, folded from the record; and ended jobs, brought back when somebody asks for one."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.core.state import AttemptChanged, JobChanged, MeshState, Policy, SiteChanged, evolve, keep
from coordinator.shell.recording import attempt_of, job_of, site_of
from coordinator.storage.recording import StoredAttempt, StoredJob
from coordinator.storage.store import Store
from edif_mesh.config import PolicyConfig, StoreConfig
from edif_mesh.domain.ids import FederationId, JobId
from edif_mesh.wire.subjects import DAY_MS

ENDED_IN_MEMORY = 2_000
"""Jobs that ended last stay in memory; older ones are read from the record when asked for."""
_BATCH = 500

History = list[JobChanged | AttemptChanged]


def recover(
    store: Store, federation: FederationId, policy: PolicyConfig, keep_rules: StoreConfig, now_ms: int
) -> MeshState:
    """Return the state as recorded: all that is open, what has still to be stopped or deleted, the newest ended jobs, and
    the index of all kept results."""
    state = MeshState(federation, policy_of(policy, keep_rules))
    for stored in store.ended_since(now_ms - state.policy.keep_results_ms):
        record = job_of(stored, "")
        keep(state, record)
        if record.job in state.deleting:
            _put(state, store, [stored])
    batch: list[StoredJob] = []
    for stored in [
        *store.recent_ended_jobs(ENDED_IN_MEMORY)[::-1],
        *store.jobs_with_active_attempts(),
        *store.open_jobs(),
    ]:
        batch.append(stored)
        if len(batch) == _BATCH:
            _put(state, store, batch)
            batch = []
    _put(state, store, batch)
    for site in store.sites():  # last: what is queued is judged again, see `MeshState.unjudged`
        evolve(state, SiteChanged(site_of(site)))
    return state


def recall(store: Store, job: JobId) -> History:
    """Return the changes that bring one recorded job and its attempts into memory; empty when there is none."""
    stored = store.job(job)
    return [] if stored is None else _history(store, [stored])


def policy_of(config: PolicyConfig, keep: StoreConfig) -> Policy:
    """Return the core's policy with the configured times and bounds."""
    return Policy(
        keep_results_ms=int(keep.keep_results_days * DAY_MS),
        max_kept_bytes=keep.most_bytes_of_one_researcher,
        max_site_kept_bytes=keep.most_bytes_of_one_site,
        lease_ms=config.lease_ms,
        suspect_ms=config.suspect_ms,
        disconnect_grace_ms=config.disconnect_grace_ms,
        grant_repeat_ms=config.grant_repeat_ms,
    )


def _put(state: MeshState, store: Store, jobs: Sequence[StoredJob]) -> None:
    for change in _history(store, jobs):
        evolve(state, change)


def _history(store: Store, jobs: Sequence[StoredJob]) -> History:
    names = [job.job for job in jobs]
    orders = store.orders(names)
    attempts: list[StoredAttempt] = store.attempts(names)
    records = [job_of(job, orders[job.job].envelope) for job in jobs]
    return [*(JobChanged(job) for job in records), *(AttemptChanged(attempt_of(item)) for item in attempts)]
