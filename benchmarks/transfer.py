"""How fast a result travels: writer and reader in two processes through a real nats-server, `sync_interval: always`.

Run from the repository: `python -m benchmarks.transfer [--sizes 1 50 300] [--runs 5] [--objects]`. Prints medians in
MB/s (1 MB = 10^6 bytes), with raw loopback TCP (and, with `--objects`, nats-py's object store) in the same run. The
clock starts when the writer feeds its first byte and stops when the reader has verified the last.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import nats

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.results.index import CHUNK_BYTES
from edif_mesh.results.transfer import ResultWriter
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import BufferSink
from edif_mesh.transport.bulk import NatsBulk
from edif_mesh.transport.nats_bus import connect
from edif_mesh.wire import subjects
from tests.builders_transfer import a_manifest
from tests.contract.nats_starter import NatsServer

ONE = AttemptNumber(1)
PIECE_BYTES = 256 << 10
"""What a runner's pipe gives at a time."""


def loop_run(main: Any) -> None:
    """Run on uvloop where there is one, as the daemons do."""
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.run(main)
        return
    asyncio.run(main)


def read_process(url: str, pipe: Pipe, follow: bool) -> None:
    loop_run(reading(url, pipe, follow))


async def reading(url: str, pipe: Pipe, follow: bool) -> None:
    bulk = NatsBulk(url, name="bench-reader")
    loop = asyncio.get_running_loop()
    while (job := await loop.run_in_executor(None, pipe.recv)) is not None:
        sink = BufferSink()
        reader = ResultReader(bulk, job, sink)
        if follow:
            await reader.follow()
        pipe.send("ready")
        parts = await loop.run_in_executor(None, pipe.recv)
        await reader.read(a_manifest(job, ONE, parts))
        pipe.send(time.monotonic())
    await bulk.close()


async def ours(url: str, sizes: list[int], runs: int, chunk_bytes: int, follow: bool) -> dict[int, list[float]]:
    """Return the seconds of each run, by size in MB."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=read_process, args=(url, there, follow))
    process.start()
    connection = await connect(url, name="bench")
    await connection.streams.ensure(subjects.STREAMS, max_bytes={spec.name: 900 << 20 for spec in subjects.STREAMS})
    bulk = NatsBulk.beside(connection)
    loop = asyncio.get_running_loop()
    took: dict[int, list[float]] = {size: [] for size in sizes}
    for number, size in enumerate(size for size in sizes for _ in range(runs + 1)):
        data, job = os.urandom(size * 1_000_000), JobId(f"j{number:023x}")
        here.send(job)
        await loop.run_in_executor(None, here.recv)
        began = time.monotonic()
        writer = ResultWriter(bulk, job, ONE, chunk_bytes=chunk_bytes)
        for start in range(0, len(data), PIECE_BYTES):
            await writer.feed(data[start : start + PIECE_BYTES])
        parts = await writer.finish()
        here.send(parts)
        ended = await loop.run_in_executor(None, here.recv)
        took[size].append(ended - began)
        await connection.streams.purge(subjects.RESULTS_STREAM, subjects.result_chunks(job))
    here.send(None)
    process.join(10)
    await bulk.close()
    await connection.close()
    return {size: seconds[1:] for size, seconds in took.items()}


def tcp_read(port: int, sizes: list[int]) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for size in sizes:
            into = memoryview(bytearray(size))
            got = 0
            while got < size:
                got += sock.recv_into(into[got:])
            sock.sendall(b"!")


def raw_tcp(sizes: list[int], runs: int) -> dict[int, list[float]]:
    """The same bytes from one process to another without any broker."""
    order = [size for size in sizes for _ in range(runs + 1)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = (server.getsockname()[1], [size * 1_000_000 for size in order])
        process = multiprocessing.get_context("spawn").Process(target=tcp_read, args=arguments)
        process.start()
        sock, _ = server.accept()
        took: dict[int, list[float]] = {size: [] for size in sizes}
        with sock:
            for size in order:
                data = os.urandom(size * 1_000_000)
                began = time.monotonic()
                sock.sendall(data)
                sock.recv(1)
                took[size].append(time.monotonic() - began)
        process.join(10)
    return {size: seconds[1:] for size, seconds in took.items()}


async def object_store(url: str, sizes: list[int], runs: int) -> dict[int, list[float]]:
    """nats-py's own way, one process, put and then get."""
    client = await nats.connect(url)
    store = await client.jetstream().create_object_store("bench")
    took: dict[int, list[float]] = {size: [] for size in sizes}
    for size in sizes:
        data = os.urandom(size * 1_000_000)
        for run in range(runs):
            began = time.monotonic()
            await store.put(f"o{run}", data)
            assert (await store.get(f"o{run}")).data == data
            took[size].append(time.monotonic() - began)
            await store.delete(f"o{run}")
    await client.close()
    return took


def show(name: str, took: dict[int, list[float]]) -> None:
    for size, seconds in took.items():
        middle = statistics.median(seconds)
        rates = [size / s for s in seconds]
        print(
            f"{name:<28} {size:>4} MB {size / middle:>7.0f} MB/s  {middle * 1000:>8.1f} ms   "
            f"({min(rates):.0f} to {max(rates):.0f}, {len(seconds)} runs)",
            flush=True,
        )


def with_server(work: Callable[[str], Any]) -> Any:
    with tempfile.TemporaryDirectory(prefix="edif-bench-") as folder:
        server = NatsServer(Path(folder))
        server.start()
        results: list[Any] = []

        async def main() -> None:
            results.append(await work(server.url))

        try:
            loop_run(main())
        finally:
            server.kill()
        return results[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 50, 300])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--chunk-kib", type=int, nargs="+", default=[CHUNK_BYTES >> 10])
    parser.add_argument("--objects", action="store_true", help="also nats-py's object store (slow)")
    options = parser.parse_args()
    show("raw loopback TCP", raw_tcp(options.sizes, options.runs))
    for kib in options.chunk_kib:
        for follow in (True, False):
            name = f"mesh, {'followed' if follow else 'read after'}, {kib} KiB"
            took = with_server(lambda url, k=kib, f=follow: ours(url, options.sizes, options.runs, k << 10, f))
            show(name, took)
    if options.objects:
        show("nats-py object store", with_server(lambda url: object_store(url, options.sizes, min(options.runs, 3))))


if __name__ == "__main__":
    main()
