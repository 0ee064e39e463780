"""The way of a result in NDIF 0.1.2, measured with its own object-store provider. Prints a table; asserts nothing.

NDIF needs Python 3.12, so it has an environment of its own, outside the repository (any build of torch; it runs on the CPU):

    python3.12 -m venv /tmp/ndif && /tmp/ndif/bin/pip install torch==2.13.0 nnsight==0.8.1 transformers==5.22.2 \
        zstandard boto3 httpx 'moto[s3,server]' 'ndif==0.1.2'
    /tmp/ndif/bin/python -m benchmarks.peers.ndif_results        # from the repository's root

What NDIF's model actor does after a block (`ModelDeployment.prepare_result`, `upload_bytes`) and what nnsight's client does with the
address: `torch.save`, zstd level 3 where the client asks for it, `ObjectStoreProvider.put` with boto3, a presigned GET, httpx
in pieces, zstd, `torch.load`. Ray, Redis, queue and the progress bar are left out. NDIF ships RustFS as its store, which no
package here brings: moto, a test server in Python, stands in for it and is slow. So each row has the time without any store
as well: what is left when store and network cost nothing at all. The truth for NDIF lies between the two.
"""

from __future__ import annotations

import argparse
import io
import os
import secrets
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.page import markdown

MB = 1_000_000
_PIECE = 1 << 17
"""As nnsight's client reads."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 50, 300], help="MB")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{port}",
        "NDIF_OBJECT_STORE_ACCESS_KEY": "testing",
        "NDIF_OBJECT_STORE_SECRET_KEY": "testing",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _await(port)
        rows = []
        for name, compress, store in (
            ("no store, no network, zstd 3 (nnsight's default)", True, False),
            ("no store, no network, not compressed", False, False),
            ("moto as the store, zstd 3", True, True),
            ("moto as the store, not compressed", False, True),
        ):
            rates = [_rate(size, compress, store, given.runs) for size in given.sizes]
            rows.append([name, *(f"{rate:.0f}" for rate in rates)])
        columns = ["MB/s, from saved values to values at the client", *(f"{size} MB" for size in given.sizes)]
        print("\n".join(markdown(columns, rows)))
    finally:
        server.kill()
        server.wait()


def _await(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("moto's server did not start within 60 s")


def _rate(size: int, compress: bool, store: bool, runs: int) -> float:
    import torch

    count = size * MB // 4
    saved = {"big": torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32)}
    times = []
    for number in range(runs + 1):
        began = time.perf_counter()
        back = _through(saved, compress, store)
        took = time.perf_counter() - began
        assert torch.equal(back["big"], saved["big"])
        if number:
            times.append(took)
    return size / statistics.median(times)


def _through(saved: Any, compress: bool, store: bool) -> Any:
    import httpx
    import torch
    import zstandard
    from ndif.common.providers.objectstore import ObjectStoreProvider

    buffer = io.BytesIO()
    torch.save(saved, buffer)
    data = buffer.getvalue()
    if compress:
        data = zstandard.ZstdCompressor(level=3).compress(data)
    if store:
        key = f"{secrets.token_hex(8)}.pt"
        ObjectStoreProvider.put(key, data)
        got = io.BytesIO()
        with httpx.stream("GET", ObjectStoreProvider.presigned_get(key), timeout=600) as response:
            response.raise_for_status()
            for piece in response.iter_bytes(chunk_size=_PIECE):
                got.write(piece)
        data = got.getvalue()
        ObjectStoreProvider.client.delete_object(Bucket=ObjectStoreProvider.bucket, Key=key)
    if compress:
        data = zstandard.ZstdDecompressor().decompress(data)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


if __name__ == "__main__":
    main()
