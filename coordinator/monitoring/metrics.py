"""Prometheus metrics. Counters are fed by the shell; gauges are read when somebody scrapes."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from coordinator.monitoring.reader import Gauges

MAX_MODELS = 50
"""Model names come from researchers: beyond this many the rest is counted as `other`."""
_SECONDS = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)


class Metrics:
    """All metrics of one coordinator, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.decision_seconds = Histogram(
            "edif_decision_seconds", "Time to decide one event.", buckets=_SECONDS, registry=self.registry
        )
        self.commit_seconds = Histogram(
            "edif_commit_seconds", "Time of one recording transaction.", buckets=_SECONDS, registry=self.registry
        )
        self.events = Counter("edif_events", "Events decided.", ["kind"], registry=self.registry)
        self.refused = Counter("edif_refused", "Messages refused.", ["code"], registry=self.registry)
        self.attempts = Counter("edif_attempts", "Attempts that ended.", ["outcome"], registry=self.registry)
        self.jobs_ended = Counter("edif_jobs_ended", "Jobs that ended.", ["outcome"], registry=self.registry)
        self.record_failures = Counter("edif_record_failures", "Recordings that failed.", registry=self.registry)
        self._epoch = Gauge("edif_epoch", "The coordinator's term.", registry=self.registry)
        self._jobs = Gauge("edif_jobs", "Jobs by status.", ["status"], registry=self.registry)
        self._queue = Gauge("edif_queue_depth", "Jobs that wait, by model.", ["model"], registry=self.registry)
        self._sites = Gauge("edif_sites", "Sites by status.", ["status"], registry=self.registry)
        self._inbox = Gauge("edif_inbox_waiting", "Events waiting to be decided.", registry=self.registry)

    def render(self, gauges: Gauges) -> bytes:
        """Return the text exposition of everything."""
        self._epoch.set(gauges.epoch)
        self._inbox.set(gauges.inbox_waiting)
        for family, values in (
            (self._jobs, gauges.jobs_by_status),
            (self._queue, _at_most(gauges.queue_by_model)),
            (self._sites, gauges.sites_by_status),
        ):
            family.clear()
            for label, value in values.items():
                family.labels(label).set(value)
        return generate_latest(self.registry)


def _at_most(counts: dict[str, int]) -> dict[str, int]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = dict(ranked[:MAX_MODELS])
    if rest := sum(count for _, count in ranked[MAX_MODELS:]):
        shown["other"] = shown.get("other", 0) + rest
    return shown
