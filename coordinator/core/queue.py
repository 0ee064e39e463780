"""The queue: interactive before batch, owners in turn by what they were served, first come first served within an owner.

Start-time fair queueing: every grant charges its owner the model's expected seconds, the owner with the least charged
goes next, and a newcomer starts at the charge of the last one served. So a sweep of thousands never starves one job.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from coordinator.core.decision import Draft
from coordinator.core.state import JobRecord, QueueKey, charge_s, queue_key
from edif_mesh.domain.ids import KeyId
from edif_mesh.domain.job import JobStatus

Turn = tuple[int, float, QueueKey, KeyId]
"""Class, what the owner was charged so far, the owner's next job, the owner."""


@dataclass
class Turns:
    """The queued jobs in the order of their turns, read lazily; `charge` moves an owner back once a job is placed."""

    draft: Draft
    _lines: dict[tuple[int, KeyId], Iterator[QueueKey]] = field(default_factory=dict)
    _charged: dict[KeyId, float] = field(default_factory=dict)
    _heap: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        state = self.draft.state
        added: dict[tuple[int, KeyId], list[QueueKey]] = {}
        for job in self.draft.changed_jobs():
            before = state.jobs.get(job.job)
            if job.status is JobStatus.QUEUED and (before is None or before.status is not JobStatus.QUEUED):
                added.setdefault((queue_key(job)[0], job.owner), []).append(queue_key(job))
        for line in {**state.lines, **added}:
            self._lines[line] = heapq.merge(state.lines.get(line, []), sorted(added.get(line, [])))
            self._push(*line)

    def __iter__(self) -> Iterator[JobRecord]:
        while self._heap:
            rank, _, key, owner = heapq.heappop(self._heap)
            job = self.draft.job(key[2])
            if job is not None and job.status is JobStatus.QUEUED:
                yield job
            self._push(rank, owner)

    def charge(self, job: JobRecord) -> None:
        """The job was placed: its owner's next one waits for the others' turns."""
        self._charged[job.owner] = self._charge_of(job.owner) + charge_s(self.draft.state, job)

    def _push(self, rank: int, owner: KeyId) -> None:
        key = next(self._lines[(rank, owner)], None)
        if key is not None:
            heapq.heappush(self._heap, (rank, self._charge_of(owner), key, owner))

    def _charge_of(self, owner: KeyId) -> float:
        state = self.draft.state
        if owner in self._charged:
            return self._charged[owner]
        waits = any((rank, owner) in state.lines for rank in (0, 1))
        served = state.served_s.get(owner, 0.0)
        return served if waits else max(served, state.served_now_s)


def position(draft: Draft, job: JobRecord) -> int | None:
    """Return how many turns it is to the job's own, 1 for the next; None when it is not queued.

    It assumes that every owner's jobs cost the same: before an owner's k-th job, each other one has about k.
    """
    if job.status is not JobStatus.QUEUED:
        return None
    state, mine = draft.state, queue_key(job)
    line = state.lines.get((mine[0], job.owner), [])
    own = bisect_left(line, mine)
    served = state.served_s.get(job.owner, 0.0)
    ahead = own
    for (rank, owner), keys in state.lines.items():
        if rank < mine[0]:
            ahead += len(keys)
        elif rank == mine[0] and owner != job.owner:
            first = (state.served_s.get(owner, 0.0), keys[0]) < (served, line[0] if line else mine)
            ahead += min(len(keys), own + (1 if first else 0))
    return ahead + 1
