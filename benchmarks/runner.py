"""A runner beside the same trace in-process: what the sandbox and the fork cost. Never asserts; prints, and writes if asked.

    python -m benchmarks.runner [--runs 30] [--models smollm2 deep] [--json FILE] [--beside NDIF.json] [--write]
    python -m benchmarks.runner --figures FILE --beside NDIF.json --write

In-process is the researcher's own local nnsight, warm: the model loaded, the block compiled. A runner is timed through the
production supervisor, from the payload handed over to the values decoded. Both run with one torch thread and in turn, so
that a drift of the machine's speed meets both. A runner is fresh for every job; the next one is ready, and has warmed up,
before the clock starts, and nothing else of the host runs then. "Back to back" is without that wait. `--beside` adds what
`benchmarks/peers/ndif.py --json` has written; `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import traces
from benchmarks.beside import AIM_MS, AIM_RATIO, Report, Row, fit, plain_table
from benchmarks.page import put_section

ROOT = Path(__file__).resolve().parent.parent
WARM_UPS = 2
_QUIET_S = 0.12
"""Longer than a runner waits before it warms up."""
_PATIENCE_S = 30.0


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="measured runs of each trace, each way")
    parser.add_argument("--busy-runs", type=int, default=6, help="runs back to back; 0 leaves that column out")
    parser.add_argument("--models", nargs="+", choices=sorted(traces.SUBJECTS), default=list(traces.SUBJECTS))
    parser.add_argument("--traces", nargs="+", choices=list(traces.TRACES), default=list(traces.TRACES))
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--figures", type=Path, help="measure nothing: take the figures that --json wrote before")
    parser.add_argument("--beside", type=Path, help="figures of benchmarks/peers/ndif.py, for the table")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/benchmarks.md")
    given = parser.parse_args()
    measure_now = given.figures is None
    report = (
        measured(given.models, given.traces, given.runs, given.busy_runs) if measure_now else Report.load(given.figures)
    )
    print(f"\n{plain_table(report)}")
    if given.json:
        report.save(given.json)
    peer = Report.load(given.beside) if given.beside else None
    if peer is not None:
        print(f"\n{plain_table(peer)}")
    if given.write:
        write(report, peer)


def measured(models: list[str], names: list[str], runs: int, busy_runs: int = 6) -> Report:
    """Measure the named traces on the named models (keys of `traces.SUBJECTS`, `traces.TRACES`)."""
    traces.prepare_cache()
    if "smollm2" in models:
        _fetch_smollm2()
    import nnsight  # noqa: F401  imported for its version, and so that its import is in no first run

    report = Report.new("edif mesh's runner", runs)
    for key in models:
        asyncio.run(_on_model(traces.SUBJECTS[key], names, report, busy_runs))
    return report


def _fetch_smollm2() -> None:
    from edif_mesh.models import fetch_demo
    from tests.models import cache

    del os.environ["HF_HUB_OFFLINE"]
    fetch_demo(cache(), lambda text, part: print(f"model: {text}", flush=True))
    os.environ["HF_HUB_OFFLINE"] = "1"


async def _on_model(subject: traces.Subject, names: list[str], report: Report, busy_runs: int) -> None:
    from tests.hosted import a_host

    profile = _profile()
    model = traces.load(subject.repo_id)
    async with a_host(subject.repo_id, sandbox=profile) as host:
        for name in names:
            row = Row(subject.name, name)
            await _on_trace(host, model, subject, name, row, report.runs)
            await _busy(host, traces.payload_of(traces.TRACES[name], model, subject.blocks), row, busy_runs)
            report.rows.append(row)
            here_cpu, there_cpu = statistics.median(row.here_cpu_ms), statistics.median(row.there_cpu_ms)
            print(
                f"{subject.name:16} {name:26} in-process {row.here:7.1f}  runner {row.there:7.1f} ms  x{row.there / row.here:.2f}"
                f"  (processor time {here_cpu:.0f} and {there_cpu:.0f} ms; {profile}; equal: {row.equal})",
                flush=True,
            )


async def _on_trace(host: Any, model: Any, subject: traces.Subject, name: str, row: Row, runs: int) -> None:
    trace = traces.TRACES[name]
    payload = traces.payload_of(trace, model, subject.blocks)
    for number in range(WARM_UPS + runs):
        await settled(host)
        model._module.zero_grad(set_to_none=True)  # as in a fresh process: no gradient is added to one that is there
        began = time.perf_counter()
        here, here_cpu_ms = _with_cpu(trace, model, subject.blocks)
        here_ms = (time.perf_counter() - began) * 1000
        there_ms, there, cpu_ms = await one_job(host, payload)
        row.equal &= traces.same(here, there)
        if number >= WARM_UPS:
            row.here_ms.append(here_ms)
            row.there_ms.append(there_ms)
            row.here_cpu_ms.append(here_cpu_ms)
            row.there_cpu_ms.append(cpu_ms)
        del here, there


def _with_cpu(trace: traces.Trace, model: Any, blocks: str) -> tuple[Any, float]:
    began = time.process_time()
    found = trace(model, blocks, None)
    return found, (time.process_time() - began) * 1000


async def _busy(host: Any, payload: bytes, row: Row, runs: int) -> None:
    for _ in range(runs):
        row.busy_ms.append((await one_job(host, payload))[0])


async def one_job(host: Any, payload: bytes) -> tuple[float, Any, int]:
    """Run one payload in a runner; returns the milliseconds to its decoded values, what it found, and its processor time."""
    from edif_mesh.domain.job import Limits
    from edif_mesh.results import archive
    from site_agent.runner.events import ResultChunk, RunnerFailed, RunnerSucceeded
    from site_agent.runner.supervisor import RunOptions

    options = RunOptions(limits=Limits(wall_ms=120_000, memory_bytes=4 << 30, result_bytes=1 << 30))
    began = time.perf_counter()
    pieces: list[Any] = []
    taken, found, cpu_ms = 0, None, 0
    async for event in (await host.lend()).run(payload, options):
        match event:
            case ResultChunk(piece):
                pieces.append(piece)
            case RunnerSucceeded(receipt):
                data = archive.allocate(sum(map(len, pieces)))
                for piece in pieces:
                    data[taken : taken + len(piece)] = piece
                    taken += len(piece)
                found, cpu_ms = archive.read(data)["found"], receipt.cpu_ms
            case RunnerFailed(code, text):
                raise SystemExit(f"The runner failed: {code}: {text}")
            case _:
                pass
    took_ms = (time.perf_counter() - began) * 1000
    host.replenish()
    return took_ms, found, cpu_ms


async def settled(host: Any) -> None:
    """Wait until a runner is ready and neither the host nor any runner of it does anything more."""
    before, since, until = -1, time.monotonic(), time.monotonic() + _PATIENCE_S
    while time.monotonic() - since < _QUIET_S or not host.ready:
        if time.monotonic() > until:
            raise SystemExit(f"No runner of {host.spec.repo_id} was ready and at rest within {_PATIENCE_S:.0f} s.")
        await asyncio.sleep(0.01)
        ticks = sum(_ticks(pid) for pid in (host.facts.pid, *(runner.pid for runner in host._children.values())))
        if ticks != before:
            before, since = ticks, time.monotonic()


def _ticks(pid: int) -> int:
    """Processor time of a process so far, in kernel ticks; 0 for one that is gone. Running counts as using it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12]) + (time.monotonic_ns() if fields[0] in "RD" else 0)


def _profile() -> Any:
    """The strongest profile that holds here without a runtime of the site's own, as a site would choose it."""
    from edif_mesh.domain.site import SandboxProfile
    from site_agent.runner.selftest import try_profile

    for profile in (SandboxProfile.NAMESPACED, SandboxProfile.BASE):
        if not try_profile(profile, ()):
            return profile
    raise SystemExit(
        "No sandbox profile holds on this machine, so there is no runner to measure (`edif-site check` says why)."
    )


# ------------------------------------------------------------------------------------------------------------- output


def write(report: Report, peer: Report | None, path: Path = ROOT / "docs" / "benchmarks.md") -> None:
    """Put the table between its marks in the page at `path`; everything else on it stays."""
    put_section("runner", section(report, peer), path)


def section(report: Report, peer: Report | None) -> str:
    """Return the section of docs/benchmarks.md."""
    lines = [
        "## A runner beside in-process",
        "",
        f"Measured on {report.date}: {report.conditions}. Medians of {report.runs}, in-process and runner in turn; the aim is "
        f"{AIM_RATIO} x in-process + {AIM_MS:.0f} ms. {_summary(report)}",
        "",
    ]
    if peer:
        lines += [
            f"Beside it {peer.what} on the same traces, in a run and an interpreter of its own with its own in-process baseline: "
            f"{peer.conditions}. Medians of {peer.runs}. {_summary(peer)}",
            "",
        ]
    columns = ["model", "trace", "in-process ms", "runner ms", "ratio", "over the aim by"]
    columns += ["processor time, in-process and runner, ms", "back to back ms"]
    columns += ["NDIF: in-process ms", "NDIF: sandbox ms", "NDIF: ratio"] if peer else []
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    beside = {(row.model, row.trace): row for row in peer.rows} if peer else {}
    for row in report.rows:
        over = row.there - (AIM_RATIO * row.here + AIM_MS)
        cells = [row.model, row.trace, f"{row.here:.1f}", f"{row.there:.1f}", f"{row.there / row.here:.2f}"]
        cells += [f"{over:.1f} ms" if over > 0 else "met", _processor_time(row)]
        cells += [
            "" if row.busy is None else f"{row.busy:.1f}",
            *(_beside(beside.get((row.model, row.trace))) if peer else ()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _summary(report: Report) -> str:
    a, b = fit(report.rows)
    equal = "equal to the bit" if all(row.equal for row in report.rows) else "NOT all equal to the bit"
    return f"Over all rows: {a:.2f} x in-process {b:+.1f} ms; results {equal}."


def _processor_time(row: Row) -> str:
    if not row.here_cpu_ms:
        return ""
    return f"{statistics.median(row.here_cpu_ms):.0f}, {statistics.median(row.there_cpu_ms):.0f}"


def _beside(row: Row | None) -> list[str]:
    """The cells of a peer's row."""
    if row is None:
        return ["", "", ""]
    if row.failed:
        return [f"{row.here:.1f}", "failed", row.failed.partition(":")[0].rpartition(".")[2]]
    return [f"{row.here:.1f}", f"{row.there:.1f}", f"{row.there / row.here:.2f}"]


if __name__ == "__main__":
    main()
