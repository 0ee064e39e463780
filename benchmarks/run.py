"""`make bench`: the whole mesh on this machine, measured; prints tables and writes them to docs/benchmarks.md.

    python -m benchmarks.run [--runs 30] [--quick] [--no-write]

Everything of one table is measured in one run, in turn, after a warm-up. Medians, with the fastest beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.page import markdown

ROOT = Path(__file__).resolve().parent.parent
MB = 1_000_000
Row = tuple[str, ...]


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30, help="measured runs of each short case")
    parser.add_argument("--quick", action="store_true", help="a few runs of each, to try the benchmark itself")
    parser.add_argument("--no-write", action="store_true", help="leave docs/benchmarks.md alone")
    given = parser.parse_args()
    runs = 5 if given.quick else given.runs
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.models import cache, tiny_gpt2

    os.environ["HF_HUB_CACHE"] = str(cache())
    tiny = tiny_gpt2()
    from edif_mesh.models import DEMO_MODEL, fetch_demo

    del os.environ["HF_HUB_OFFLINE"]
    fetch_demo(cache(), lambda text, part: print(f"model: {text}", flush=True))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from edif_mesh.cli.up import run_down, run_up
    from edif_mesh.transport.embedded import free_port

    with tempfile.TemporaryDirectory(prefix="edif-bench-") as folder:
        home, port = Path(folder), free_port()
        os.environ["EDIF_HOME"], os.environ["NDIF_HOST"] = str(home), f"http://127.0.0.1:{port}"
        run_up(
            sites=2,
            models=(tiny, DEMO_MODEL),
            port=port,
            monitor_port=free_port(),
            slots=2,
            state=home,
            detach=True,
            json=False,
        )
        try:
            tables = measure(tiny, DEMO_MODEL, runs)
        finally:
            run_down(state=home, json=False)
    page = render(tables, runs)
    print(page)
    if not given.no_write and not given.quick:
        write(page)


def measure(tiny: str, large: str, runs: int) -> list[tuple[str, Row, list[Row]]]:
    """Return the tables: title, columns, rows."""
    import torch

    torch.set_num_threads(1)
    return [
        ("A minimal trace on a tiny model (2-layer GPT-2), ms", ("path", "median", "fastest", "over local"), traces(tiny, runs)),
        ("The same on SmolLM2-135M, ms", ("path", "median", "fastest", "over local"), traces(large, runs)),
        ("Results, MB/s from submission to values in memory", ("result", "raw loopback TCP", "Python client", "unmodified nnsight"), results(tiny, max(3, runs // 6))),
        ("Jobs a second (tiny model, kept connections)", ("clients", "jobs/s", "median latency, ms"), throughput(tiny, runs)),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- traces


def traces(model_id: str, runs: int) -> list[Row]:
    """One read of the logits: in-process, through the Python client, through unmodified nnsight."""
    from edif_mesh.client import BlockingMesh

    model, prompt = load(model_id), "The Eiffel Tower is in the city of"

    def local() -> None:
        with model.trace(prompt):
            model.lm_head.output.save()

    def unmodified() -> None:
        with model.trace(prompt, remote=True):
            model.lm_head.output.save()

    with BlockingMesh() as mesh:

        def client() -> None:
            with model.trace(prompt, backend=mesh.backend(model)):
                model.lm_head.output.save()

        cases: dict[str, Callable[[], None]] = {
            "nnsight, local in-process": local,
            "mesh, Python client, kept connection": client,
            "mesh, unmodified nnsight (remote=True)": unmodified,
        }
        times = in_turn(cases, runs)
    base = statistics.median(times["nnsight, local in-process"])
    return [
        (name, f"{statistics.median(t):.1f}", f"{min(t):.1f}", f"{statistics.median(t) - base:+.1f}")
        for name, t in times.items()
    ]


def in_turn(cases: dict[str, Callable[[], None]], runs: int) -> dict[str, list[float]]:
    """Time the cases A B C A B C ..., so that a drift of the machine's speed meets all alike; ms."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(runs + 3):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if number >= 3:
                times[name].append((time.perf_counter() - began) * 1000)
    return times


def load(model_id: str) -> Any:
    """Load a model for local runs, quietly."""
    from nnsight import CONFIG, TransformersModel
    from nnsight.modeling import huggingface

    CONFIG.APP.REMOTE_LOGGING = False
    CONFIG.API.HOST = os.environ["NDIF_HOST"]
    huggingface._ID_CACHE[model_id] = model_id
    return TransformersModel(model_id, task="text-generation", dispatch=True)


# ------------------------------------------------------------------------------------------------------------ results


def results(model_id: str, runs: int) -> list[Row]:
    """Large results, beside the same bytes through a plain socket in the same turn."""
    import torch

    from edif_mesh.client import BlockingMesh

    model, rows = load(model_id), []
    for size in (50, 300):
        count = size * MB // 4

        def unmodified(count: int = count) -> None:
            with model.trace("hello", remote=True):
                model.lm_head.output.sum()
                values = torch.arange(count, dtype=torch.float32).save()  # noqa: F841

        with BlockingMesh() as mesh:

            def client(count: int = count, mesh: BlockingMesh = mesh) -> None:
                with model.trace("hello", backend=mesh.backend(model)):
                    model.lm_head.output.sum()
                    values = torch.arange(count, dtype=torch.float32).save()  # noqa: F841

            times = in_turn(
                {"tcp": lambda size=size: raw_tcp(size * MB), "client": client, "unmodified": unmodified}, runs
            )
        speed = {name: size / (statistics.median(t) / 1000) for name, t in times.items()}
        rows.append((f"{size} MB", f"{speed['tcp']:.0f}", f"{speed['client']:.0f}", f"{speed['unmodified']:.0f}"))
    return rows


def raw_tcp(size: int) -> None:
    """Send `size` bytes from another process over loopback into memory."""
    listener = socket.create_server(("127.0.0.1", 0))
    code = (
        "import socket,sys; s=socket.create_connection(('127.0.0.1',int(sys.argv[1]))); d=bytes(1<<20); n=int(sys.argv[2])\n"
        "while n>0: s.sendall(d[:min(n,1<<20)]); n-=1<<20"
    )
    sender = subprocess.Popen([sys.executable, "-S", "-E", "-c", code, str(listener.getsockname()[1]), str(size)])
    connection, _ = listener.accept()
    target = memoryview(bytearray(size))
    filled = 0
    while filled < size and (count := connection.recv_into(target[filled:])):
        filled += count
    sender.wait()
    connection.close()
    listener.close()


# --------------------------------------------------------------------------------------------------------- throughput


def throughput(model_id: str, runs: int) -> list[Row]:
    """Many clients at once, each with a connection of its own, one job after another."""
    from edif_mesh.client.backend import capture

    model = load(model_id)
    captured: list[Any] = []

    class Capture:
        def __call__(self, tracer: Any) -> None:
            captured.append(capture(tracer, model))

    with model.trace("hello world", backend=Capture()):
        model.lm_head.output.save()
    return [asyncio.run(_clients(count, captured[0], runs * 4)) for count in (1, 4, 16)]


async def _clients(count: int, job: Any, total: int) -> Row:
    from edif_mesh.client import Mesh

    meshes = [await Mesh.connect() for _ in range(count)]
    latencies: list[float] = []

    async def client(mesh: Mesh, jobs: int) -> None:
        for _ in range(jobs):
            began = time.perf_counter()
            await (await mesh.submit(*job)).result()
            latencies.append((time.perf_counter() - began) * 1000)

    await asyncio.gather(*(client(mesh, 2) for mesh in meshes))
    latencies.clear()
    began = time.perf_counter()
    await asyncio.gather(*(client(mesh, max(2, total // count)) for mesh in meshes))
    took = time.perf_counter() - began
    for mesh in meshes:
        await mesh.close()
    return (str(count), f"{len(latencies) / took:.1f}", f"{statistics.median(latencies):.1f}")


# ------------------------------------------------------------------------------------------------------------- output


def render(tables: list[tuple[str, Row, list[Row]]], runs: int) -> str:
    """Return the page."""
    lines = [
        "# Benchmarks",
        "",
        f"Measured with `make bench` on {datetime.date.today().isoformat()}: {machine()}. Medians of {runs} runs (large results: "
        f"{max(3, runs // 6)}) after a warm-up, all cases of a table in turn in one run. Everything (client, gateway, broker, coordinator, "
        "two sites) shares this machine and its disk; the broker flushes every message (`sync_interval: always`).",
        "",
    ]
    for title, columns, rows in tables:
        lines += [f"## {title}", "", *markdown(columns, rows), ""]
    return "\n".join(lines)


def machine() -> str:
    """Name the machine: cores, processor, memory, versions; nothing that identifies it."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"


def write(page: str) -> None:
    """Replace the generated part of docs/benchmarks.md; what was written by hand below the marker stays."""
    path = ROOT / "docs" / "benchmarks.md"
    marker = "<!-- below: written by hand -->"
    kept = path.read_text().partition(marker)[2] if path.exists() else "\n"
    path.write_text(f"{page}\n{marker}{kept}")


if __name__ == "__main__":
    main()
