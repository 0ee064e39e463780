"""NDIF 0.1.2's own sandbox beside the same traces in-process, in one interpreter. Prints a table; asserts nothing.

NDIF needs Python 3.12, so it has an environment of its own, outside the repository (any build of torch; it runs on the CPU):

    python3.12 -m venv /tmp/ndif && /tmp/ndif/bin/pip install torch==2.13.0 nnsight==0.8.1 transformers==5.22.2 \
        accelerate zstandard greenlet 'ndif==0.1.2'
    /tmp/ndif/bin/python -m benchmarks.peers.ndif --json ndif.json         # from the repository's root
    .venv/bin/python -m benchmarks.runner --beside ndif.json --write       # both in one table

Ten runs of each trace take about seven minutes on two cores, most of it for starting NDIF's runners: `--runs 30` a quarter of
an hour more. The models must be in the cache already: run `python -m benchmarks.runner --runs 1` once before. Of NDIF this uses what its
model actor uses (`ndif.services.ray.sandbox`): `host.spawn` for a runner process as it ships, started with the model's key,
`SandboxDriver` to drive the loaded model for it, and the blob of saved values that a client gets. Ray, Redis, queue, object
store and HTTP are left out, and runners are started in batches while nothing is timed, so that NDIF's pool, which would
refill itself beside a job, costs it nothing here. Timed is: connection, payload, block and model, values loaded.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import traces
from benchmarks.beside import Report, Row, plain_table

WARM_UPS = 1
_BATCH = 6
"""Runners started at once: about 0.5 GB each."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=int, default=10, help="measured runs of each trace; a runner takes seconds to start"
    )
    parser.add_argument("--models", nargs="+", choices=sorted(traces.SUBJECTS), default=list(traces.SUBJECTS))
    parser.add_argument("--traces", nargs="+", choices=list(traces.TRACES), default=list(traces.TRACES))
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    given = parser.parse_args()
    cache = traces.prepare_cache()
    os.environ["HUGGINGFACE_HUB_CACHE"] = str(cache)  # a name that NDIF hands on to its runners
    try:
        from ndif.services.ray.sandbox import host  # noqa: F401
    except ImportError as error:
        sys.exit(f"NDIF is not installed here: {error}. See the top of {__file__}.")
    from importlib.metadata import version

    report = Report.new(f"NDIF {version('ndif')}'s sandbox", given.runs)
    for key in given.models:
        _on_model(traces.SUBJECTS[key], given.traces, report, cache)
    print(f"\n{plain_table(report)}")
    if given.json:
        report.save(given.json)


def _on_model(subject: traces.Subject, names: list[str], report: Report, cache: Path) -> None:
    from ndif.services.ray.sandbox.driver import RunnerError

    model = traces.load(subject.repo_id)
    key = _key(model, traces.folder_of(subject.repo_id, cache))
    with Runners(key, len(names) * (WARM_UPS + report.runs)) as runners:
        for name in names:
            trace, row = traces.TRACES[name], Row(subject.name, name)
            payload = traces.payload_of(trace, model, subject.blocks)
            for number in range(WARM_UPS + report.runs):
                runner = runners.take()
                model._module.zero_grad(set_to_none=True)
                began = time.perf_counter()
                here = trace(model, subject.blocks, None)
                here_ms = (time.perf_counter() - began) * 1000
                model._module.zero_grad(set_to_none=True)
                try:
                    there_ms, there = _one_job(runner, model, payload)
                except RunnerError as error:
                    row.failed = str(error).strip().splitlines()[-1]
                    break
                finally:
                    runner.stop()
                row.equal &= traces.same(here, there)
                if number >= WARM_UPS:
                    row.here_ms.append(here_ms)
                    row.there_ms.append(there_ms)
            row.here_ms = row.here_ms or [here_ms]
            report.rows.append(row)
            outcome = (
                f"sandbox {row.there:7.1f} ms  x{row.there / row.here:.2f}  (equal: {row.equal})"
                if not row.failed
                else f"sandbox failed: {row.failed}"
            )
            print(f"{subject.name:16} {name:26} in-process {row.here:7.1f}  {outcome}", flush=True)


def _one_job(runner: Any, model: Any, payload: bytes) -> tuple[float, Any]:
    """Do what NDIF's `SandboxHost.run_in_runner` does, and load the values as a client does."""
    import torch
    from ndif.services.ray.sandbox.driver import SandboxDriver

    dtype = next(model._module.parameters()).dtype
    began = time.perf_counter()
    connection = runner.connection()
    try:
        connection.send((payload, False, str(dtype), None, {}))
        blob, _ = SandboxDriver(model, dtype).pump(connection)
    finally:
        connection.close()
    values = torch.load(io.BytesIO(blob), weights_only=False)
    return (time.perf_counter() - began) * 1000, values["found"]


def _key(model: Any, folder: Path) -> str:
    """The model's key as NDIF's actor hands it to its runners, naming the folder: a runner gets no word that it is offline."""
    key = str(model.to_model_key())
    return key.replace(_hub_id(key), str(folder))


def _hub_id(key: str) -> str:
    """Return the hub id inside a model key."""
    return next(subject.repo_id for subject in traces.SUBJECTS.values() if subject.repo_id in key)


class Runners:
    """Fresh NDIF runners, started a batch at a time while nothing is timed; each is the taker's to stop."""

    def __init__(self, key: str, total: int) -> None:
        self._key, self._left = key, total
        self._ready: list[Any] = []

    def __enter__(self) -> Runners:
        return self

    def __exit__(self, *_: object) -> None:
        for runner in self._ready:
            runner.stop()

    def take(self) -> Any:
        """Return a runner that is ready; starts the next batch, and waits for all of it, when there is none."""
        if not self._ready:
            self._ready = list(self._started(min(_BATCH, self._left)))
            self._left -= len(self._ready)
            time.sleep(0.3)
        return self._ready.pop()

    def _started(self, count: int) -> Iterator[Any]:
        from ndif.services.ray.sandbox.host import spawn

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            yield from pool.map(lambda _: spawn(model_key=self._key, timeout=120), range(count))


if __name__ == "__main__":
    main()
