"""How fast results travel, beside what else could carry them; time to the first value; memory; a link across Europe.

    python -m benchmarks.results [--sizes 1 50 300 2000] [--runs 5] [--write] [--only speed rtt first memory]

All cases of a size in turn in one run; medians. The values are random numbers, so that compression does not flatter. A mesh is
started for it on this machine, as `edif up` does: client, gateway, broker, coordinator, site and runner share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import http.server
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.link import Link
from benchmarks.page import markdown, put_section
from benchmarks.run import ROOT, machine

MB = 1_000_000
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def main() -> None:
    """Measure and print; with `--write` into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 50, 300, 2000], help="MB")
    parser.add_argument(
        "--runs", type=int, default=5, help="of each case after a warm-up; 1, and sizes above 1 GB: two without one"
    )
    parser.add_argument("--only", nargs="+", default=["speed", "first", "rtt", "memory"])
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    from tests.models import cache, tiny_gpt2

    os.environ["HF_HUB_CACHE"] = str(cache())
    model = tiny_gpt2()
    tables: list[Table] = []
    with fresh_mesh(model) as bench:
        if "speed" in given.only:
            tables.append(speeds(bench, given.sizes, given.runs))
        if "first" in given.only:
            tables.append(first_values(bench, 2 * given.runs))
        if "rtt" in given.only:
            tables.append(far(bench, [size for size in given.sizes if size <= 300], given.runs))
    if "memory" in given.only:
        with fresh_mesh(model) as bench:  # processes that have done nothing yet
            tables.append(memory(bench))
    page = render(tables, given.runs)
    print(page)
    if given.write:
        put_section("results", page, ROOT / "docs" / "benchmarks.md")


@contextlib.contextmanager
def fresh_mesh(model: str) -> Iterator[Bench]:
    """A mesh of one site, started for the measurement."""
    from tests.mesh import running_mesh

    with (
        tempfile.TemporaryDirectory(prefix="edif-bench-") as folder,
        running_mesh(Path(folder), model, sites=1) as mesh,
    ):
        os.environ["EDIF_HOME"], os.environ["NDIF_HOST"] = str(mesh.home), mesh.gateway_url
        yield Bench(mesh, model)


class Bench:
    """The mesh, the model, and jobs that return so many bytes."""

    def __init__(self, mesh: Any, model: str) -> None:
        from benchmarks.run import load

        self.mesh, self.model = mesh, load(model)
        self.config = mesh.home / "client.toml"

    def payload(self, megabytes: int) -> Any:
        """The job that saves a tensor of random numbers of this size."""
        from edif_mesh.client.backend import capture
        from edif_mesh.domain.job import Limits

        captured: list[Any] = []
        limits = Limits(wall_ms=600_000, memory_bytes=8 << 30, result_bytes=4 << 30, log_bytes=1 << 20)
        repeats = max(1, megabytes // 4)
        count = megabytes * MB // 4 // repeats // 100 * 100
        take = lambda tracer: captured.append(capture(tracer, self.model, limits=limits))  # noqa: E731
        with self.model.trace("hello", backend=take):
            import torch

            rows = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32).repeat(repeats).reshape(-1, 100)
            big = rows.save()  # noqa: F841
        return captured[0]

    async def client(self, *, direct: bool = True, config: Path | None = None) -> Any:
        """A connected client that shares nothing with earlier ones."""
        from dataclasses import replace

        from edif_mesh.client.mesh import Mesh
        from edif_mesh.config import ClientConfig, load_config

        settings = load_config(ClientConfig, config or self.config)
        if hasattr(settings.results, "direct"):
            settings = replace(settings, results=replace(settings.results, direct=direct))
        mesh = await Mesh.connect(settings)
        mesh.session = secrets.token_hex(8)
        return mesh

    async def job(self, megabytes: int) -> str:
        """Run a job to its end without fetching anything; returns its id."""
        mesh = await self.client()
        job = await mesh.submit(*self.payload(megabytes), follow=False)
        await job.wait()
        await mesh.close()
        return str(job.id)

    async def delete(self, *jobs: str) -> None:
        """Give the room back."""
        mesh = await self.client()
        for job in jobs:
            await mesh.job(job).delete()
        await mesh.close()


# -------------------------------------------------------------------------------------------------------------- speed


def speeds(bench: Bench, sizes: list[int], runs: int) -> Table:
    """MB/s of every way, by size."""
    rows: dict[str, list[str]] = {}
    for size in sizes:
        count = runs if size <= 1000 else 1
        took = asyncio.run(_speed(bench, size, count))
        for name, seconds in took.items():
            rate = f"{size / statistics.median(seconds):.0f}" if seconds else "not run"
            rows.setdefault(name, ["not run"] * sizes.index(size)).append(rate)
            print(f"{size:>5} MB  {name:<60} {rate:>6} MB/s", flush=True)
        for cells in rows.values():
            cells += ["not run"] * (sizes.index(size) + 1 - len(cells))
    columns = ("MB/s", *(f"{size} MB" for size in sizes))
    return ("Results, MB/s", columns, [(name, *cells) for name, cells in rows.items()])


async def _speed(bench: Bench, size: int, runs: int) -> dict[str, list[float]]:
    job = await bench.job(size)
    through, direct = await bench.client(direct=False), await bench.client()

    async def fetched(mesh: Any) -> None:
        await mesh.job(job).archive()

    async def only_direct() -> None:
        from edif_mesh.results.forms import FormOpener
        from edif_mesh.results.transfer_read import ResultReader
        from edif_mesh.results.transfer_sinks import BufferSink

        handle = direct.job(job)
        manifest = handle.verified_manifest(await handle.status())
        way = _OnlyDirect(direct.paths.direct(manifest))
        stats = await ResultReader(
            direct.bulk, handle.id, BufferSink(), opener=FormOpener(), sources=lambda _: [way]
        ).read(manifest)
        assert stats.refused_chunks == 0
        assert way.bytes >= manifest.stored_bytes

    async def submitted() -> None:
        mesh = await bench.client()
        payload = bench.payload(size)
        began = time.perf_counter()
        handle = await mesh.submit(*payload)
        await handle.result()
        cases_took.append(time.perf_counter() - began)
        await handle.delete()
        await mesh.close()

    async def unmodified() -> None:
        model, repeats = bench.model, max(1, size // 4)
        count = size * MB // 4 // repeats

        def work() -> None:
            with model.trace("hello", remote=True):
                import torch

                big = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32).repeat(repeats).save()  # noqa: F841

        await asyncio.to_thread(work)

    async def tcp() -> None:
        await asyncio.to_thread(_raw_tcp, size * MB, cases_took)

    cases_took: list[float] = []
    cases: dict[str, Callable[[], Any]] = {
        "raw loopback TCP": tcp,
        "plain HTTP (sendfile, raw reader)": lambda: asyncio.to_thread(_http, size * MB, False, cases_took),
        "plain HTTP (sendfile, httpx)": lambda: asyncio.to_thread(_http, size * MB, True, cases_took),
        "mesh, a finished result, through NATS": lambda: fetched(through),
        "mesh, a finished result, by the way that the client chooses": lambda: fetched(direct),
        "mesh, Python client, from submission to values": submitted,
    }
    cases["mesh, unmodified nnsight, from submission to values"] = unmodified
    if size <= 50:
        cases["object store of nats-py, get"] = lambda: _object_store(bench, size, cases_took)
    if size >= 4:  # a smaller one is not kept for the endpoint
        cases["mesh, a finished result, directly from its site over HTTPS"] = only_direct
    took: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(runs + 1):
        for name, case in cases.items():
            cases_took.clear()
            began = time.perf_counter()
            await case()
            seconds = cases_took[0] if cases_took else time.perf_counter() - began
            if number or runs == 1:
                took[name].append(seconds)
    await through.close()
    await direct.close()
    await bench.delete(job)
    _served(size * MB).unlink(missing_ok=True)
    return took


class _OnlyDirect:
    """The direct way and no other: what it does not give fails."""

    def __init__(self, source: Any) -> None:
        self._source, self.bytes = source, 0

    def refused(self, reason: str) -> None:
        raise AssertionError(reason)

    async def chunks(self, address: Any, wanted: Any) -> Any:
        async for batch in self._source.chunks(address, wanted):
            self.bytes += sum(len(data) for _, data in batch)
            yield batch


def _served(size: int) -> Path:
    return Path(tempfile.gettempdir()) / f"edif-bench-{os.getpid()}-{size}"


def _touched(size: int) -> memoryview:
    """Memory whose pages are there."""
    return memoryview(bytearray(b"x") * size)


def _raw_tcp(size: int, took: list[float]) -> None:
    """From another process over loopback into memory; the clock starts with the connection."""
    code = (
        "import socket,sys; s=socket.create_connection(('127.0.0.1',int(sys.argv[1]))); d=bytes(1<<20); n=int(sys.argv[2])\n"
        "s.recv(1)\n"
        "while n>0: s.sendall(d[:min(n,1<<20)]); n-=1<<20"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = subprocess.Popen([sys.executable, "-S", "-E", "-c", code, str(listener.getsockname()[1]), str(size)])
        connection, _ = listener.accept()
    with connection:
        into, got = _touched(size), 0
        began = time.perf_counter()
        connection.sendall(b"!")
        while got < size and (count := connection.recv_into(into[got:])):
            got += count
        took.append(time.perf_counter() - began)
    sender.wait()


def _http(size: int, library: bool, took: list[float]) -> None:
    """A file of this size from another process's web server into memory."""
    import http.client

    import httpx

    path = _served(size)
    if not path.exists():
        path.write_bytes(os.urandom(min(size, 1 << 24)) * (size // min(size, 1 << 24) + 1))
        os.truncate(path, size)
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.results", "--only", f"http:{path}"], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert server.stdout is not None
    port = int(server.stdout.readline())
    into, got = memoryview(b"") if library else _touched(size), 0
    try:
        began = time.perf_counter()
        if library:
            with httpx.stream("GET", f"http://127.0.0.1:{port}/") as answer:
                assert sum(len(piece) for piece in answer.iter_bytes(1 << 20)) == size
        else:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/")
            reply = connection.getresponse()
            while got < size:
                got += reply.readinto(into[got:])
            connection.close()
        took.append(time.perf_counter() - began)
    finally:
        server.kill()
        server.wait()


def serve_file(path: Path) -> None:
    """Serve one file by sendfile."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.send_response(200)
                self.send_header("content-length", str(size))
                self.end_headers()
                self.wfile.flush()
                self.connection.sendfile(file)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


async def _object_store(bench: Bench, size: int, took: list[float]) -> None:
    """nats-py's own way on the same broker; only the reading counts."""
    import nats

    from edif_mesh.config import ClientConfig, load_config

    broker = load_config(ClientConfig, bench.config).broker
    password = _password(bench.mesh.home, "coordinator")
    client = await nats.connect(broker.url, user="coordinator", password=password)
    try:
        store = await client.jetstream().create_object_store("bench")
        data = os.urandom(size * MB)
        await store.put("o", data)
        began = time.perf_counter()
        assert len((await store.get("o")).data) == len(data)
        took.append(time.perf_counter() - began)
    finally:
        with contextlib.suppress(Exception):
            await client.jetstream().delete_object_store("bench")
        await client.close()


def _password(home: Path, user: str | None) -> str | None:
    for path in home.rglob("*.password"):
        if user is not None and path.stem == user:
            return path.read_text().strip()
    return None


# -------------------------------------------------------------------------------------------------------- first value


def first_values(bench: Bench, runs: int) -> Table:
    """From `save()` in the runner to the value in the client, while the job goes on."""
    rows = []
    for name, count in (("a scalar's neighbour: 4 kB", 1000), ("1 MB", 250_000), ("50 MB", 12_500_000)):
        times = asyncio.run(_first(bench, count, runs))
        rows.append((name, f"{statistics.median(times):.0f}", f"{min(times):.0f}", f"{max(times):.0f}"))
        print("first value:", *rows[-1], flush=True)
    return (
        "From the line after `save()` to the value at the client while the job runs, ms",
        ("value", "median", "fastest", "slowest"),
        rows,
    )


def _first_payload(bench: Bench, count: int) -> Any:
    from edif_mesh.client.backend import capture

    captured: list[Any] = []
    with bench.model.trace("hello", backend=lambda tracer: captured.append(capture(tracer, bench.model))):
        import time as clock

        import torch

        value = torch.rand(count)
        clock.sleep(0.5)
        value.save()
        saved_at = torch.full((1,), clock.time(), dtype=torch.float64).save()  # noqa: F841
        clock.sleep(2)
    return captured[0]


async def _first(bench: Bench, count: int, runs: int) -> list[float]:
    payload, times = _first_payload(bench, count), []
    for _ in range(runs):
        mesh = await bench.client()
        job = await mesh.submit(*payload)
        seen: dict[str, tuple[float, Any]] = {}
        async for name, value in job.live():
            seen[name] = time.time(), value
        saved = float(seen["saved_at"][1][0])
        times.append(1000 * (next(at for name, (at, _) in seen.items() if name != "saved_at") - saved))
        await job.delete()
        await mesh.close()
    return times


# ----------------------------------------------------------------------------------------------------------------- far


def far(bench: Bench, sizes: list[int], runs: int) -> Table:
    """The researcher 60 ms away from the broker: fetching, a slice; and a site that far away: storing."""
    rows: list[tuple[str, ...]] = []
    for size in sizes:
        fetch, slice_s, moved, store, object_put = asyncio.run(_far(bench, size, runs))
        rows.append(
            (
                f"{size} MB",
                f"{size / statistics.median(fetch):.0f}",
                f"{size / statistics.median(store):.0f}",
                f"{statistics.median(slice_s) * 1000:.0f}",
                f"{100 * moved / (size * MB):.2f} %",
                f"{size / object_put:.1f}" if object_put else "not run",
            )
        )
        print("60 ms:", *rows[-1], flush=True)
    columns = (
        "result",
        "fetch, MB/s",
        "store (a far site), MB/s",
        "1 % of it, ms",
        "bytes moved for it",
        "object store put, MB/s",
    )
    return ("With a round trip of 60 ms to the broker", columns, rows)


async def _far(bench: Bench, size: int, runs: int) -> tuple[list[float], list[float], int, list[float], float]:
    from edif_mesh.config import ClientConfig, load_config

    broker = load_config(ClientConfig, bench.config).broker
    job = await bench.job(size)
    fetch, slices, moved, store, object_put = [], [], 0, [], 0.0
    with Link(broker.url.rpartition("/")[2], rtt_ms=60) as link:
        config = bench.mesh.home / "far.toml"
        config.write_text(bench.config.read_text().replace(broker.url, f"nats://{link.address}"))
        for _ in range(runs):
            mesh = await bench.client(direct=False, config=config)
            began = time.perf_counter()
            await mesh.job(job).archive()
            fetch.append(time.perf_counter() - began)
            for path in (bench.mesh.home / "cache").glob(f"{job}*"):
                path.unlink()
            before = link.carried()[0]
            began = time.perf_counter()
            with await mesh.job(job).open() as result:
                rows = len(result["big"])
                await result["big"].at(slice(rows // 2, rows // 2 + max(1, rows // 100)))
            slices.append(time.perf_counter() - began)
            moved = link.carried()[0] - before
            await mesh.close()
            store.append(await _store(bench, f"nats://{link.address}", size))
        if size <= 50:
            object_put = await _far_put(bench, link.address, size)
    await bench.delete(job)
    return fetch, slices, moved, store, object_put


async def _store(bench: Bench, url: str, size: int) -> float:
    """Seconds to store so much durably, as a site does."""
    from edif_mesh.domain.ids import AttemptNumber, JobId
    from edif_mesh.results.index import CHUNK_BYTES
    from edif_mesh.results.transfer import ResultWriter
    from edif_mesh.transport.bulk import NatsBulk
    from edif_mesh.transport.nats_link import Access
    from edif_mesh.wire import subjects

    user = "site"
    password = _password(bench.mesh.home, user)
    access = Access(user=user, password=password) if password else Access()
    bulk = NatsBulk(url, name="bench", access=access)
    job = JobId("j" + secrets.token_hex(12)[:23])
    data = memoryview(os.urandom(1 << 24) * (size * MB // (1 << 24) + 1))[: size * MB].toreadonly()
    await bulk.lane()
    began = time.perf_counter()
    writer = ResultWriter(bulk, job, AttemptNumber(1))
    for start in range(0, len(data), CHUNK_BYTES):
        await writer.feed(data[start : start + CHUNK_BYTES])
    await writer.finish()
    took = time.perf_counter() - began
    with contextlib.suppress(Exception):
        await bulk.api(f"STREAM.PURGE.{subjects.RESULTS_STREAM}", {"filter": subjects.result_chunks(job)})
    await bulk.close()
    return took


async def _far_put(bench: Bench, address: str, size: int) -> float:
    import nats

    user = "coordinator"
    client = await nats.connect(f"nats://{address}", user=user, password=_password(bench.mesh.home, user))
    try:
        store = await client.jetstream(timeout=60).create_object_store("bench")
        data = os.urandom(size * MB)
        began = time.perf_counter()
        await store.put("o", data)
        return time.perf_counter() - began
    finally:
        with contextlib.suppress(Exception):
            await client.jetstream().delete_object_store("bench")
        await client.close()


# -------------------------------------------------------------------------------------------------------------- memory


def memory(bench: Bench) -> Table:
    """The most memory that each process had of its own while a result was made, stored and fetched into a file."""
    peaks = {size: _peaks(bench, size) for size in (300, 2000)}
    names = [name for name in peaks[300] if name in peaks[2000]]
    rows = [(name, *(f"{peaks[size][name] / 1e6:.0f}" for size in (300, 2000))) for name in names]
    return (
        "Memory of its own of each process at its highest, MB (anonymous and shared; the page cache of files not counted)",
        ("process", "300 MB", "2 GB"),
        rows,
    )


def _peaks(bench: Bench, size: int) -> dict[str, int]:
    watched: dict[str, psutil.Process] = {}
    for name in bench.mesh.processes():
        watched[name] = bench.mesh.family(name)[0]
    site = watched["site-ansbach"]
    ended = threading.Event()
    peaks: dict[str, int] = {}

    def watch() -> None:
        while not ended.wait(0.02):
            for name, process in list(watched.items()):
                with contextlib.suppress(OSError, psutil.Error):
                    peaks[name] = max(peaks.get(name, 0), _own_bytes(process.pid))
            with contextlib.suppress(OSError, psutil.Error):
                for child in site.children(recursive=True):
                    endpoint = "endpoint" in " ".join(child.cmdline())
                    name = "endpoint of the site" if endpoint else "runner (it makes the values) or model host"
                    peaks[name] = max(peaks.get(name, 0), _own_bytes(child.pid))

    watching = threading.Thread(target=watch)
    watching.start()
    job = asyncio.run(bench.job(size))
    target = bench.mesh.home / "fetched.edif"
    fetching = subprocess.Popen(
        [sys.executable, "-m", "edif_mesh.cli", "fetch", job, "-o", str(target), "--json"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    watched["edif fetch"] = psutil.Process(fetching.pid)
    assert fetching.wait() == 0
    target.unlink()
    import httpx

    url = httpx.get(f"{bench.mesh.gateway_url}/response/{job}", timeout=600).json()["data"]
    with httpx.stream("GET", url, timeout=600) as answer:
        assert sum(len(piece) for piece in answer.iter_raw(1 << 20)) > size * MB
    ended.set()
    watching.join()
    asyncio.run(bench.delete(job))
    print("memory:", size, {name: f"{value / 1e6:.0f} MB" for name, value in peaks.items()}, flush=True)
    return peaks


def _own_bytes(pid: int) -> int:
    own = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon", "RssShmem")):
            own += int(line.split()[1]) * 1024
    return own


def render(tables: list[Table], runs: int) -> str:
    """Return the section of the page."""
    lines = [
        "## Results",
        "",
        f"Measured with `python -m benchmarks.results` on {datetime.date.today().isoformat()}: {machine()}. Medians of {max(runs, 2)} runs (2 GB: 2), all "
        "cases of a size in turn. Random numbers; everything shares this machine.",
        "",
    ]
    for title, columns, rows in tables:
        lines += [f"### {title}", "", *markdown(columns, rows), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2].startswith("http:"):
        serve_file(Path(sys.argv[2].removeprefix("http:")))
    else:
        main()
