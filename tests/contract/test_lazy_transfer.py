"""A slice of a large result at a real nats-server, in chunks of the real size, moves about its own bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edif_mesh.domain.ids import AttemptNumber, JobId
from edif_mesh.results.archive import Cut, plan
from edif_mesh.results.lazy import open_result
from edif_mesh.results.lazy_tensor import no_waiting
from edif_mesh.results.transfer import ResultWriter
from edif_mesh.results.transfer_read import ResultReader
from edif_mesh.results.transfer_sinks import FileSink
from edif_mesh.transport.bulk import NatsBulk
from edif_mesh.transport.nats_bus import connect
from edif_mesh.wire import subjects
from tests.builders_transfer import a_manifest
from tests.contract.nats_starter import NatsServer
from tests.same_values import assert_same

JOB = JobId("j0000000000000000000000a")
ONE = AttemptNumber(1)


@pytest.mark.parametrize(
    ("layers", "chunk_bytes"),
    [(16, 64 << 10), pytest.param(100, 960 << 10, marks=pytest.mark.slow), pytest.param(640, 960 << 10, marks=pytest.mark.slow)],
)  # fmt: skip
async def test_one_percent_moves_under_two_percent(tmp_path: Path, layers: int, chunk_bytes: int) -> None:
    """50 MB, 314 MB, 2 GB: `layers` x 400 tokens x 2048 numbers of 4 bytes."""
    acts = torch.arange(layers * 400 * 2048, dtype=torch.int32).reshape(layers, 400, 2048)
    server = NatsServer(tmp_path)
    server.start()
    connection = await connect(server.url, name="lazy")
    room = {spec.name: (3 << 30) if spec.name == subjects.RESULTS_STREAM else (16 << 20) for spec in subjects.STREAMS}
    await connection.streams.ensure(subjects.STREAMS, max_bytes=room)
    bulk, other = NatsBulk.beside(connection), NatsBulk.beside(connection)
    try:
        archive = plan({"acts": acts, "loss": 0.5})
        writer = ResultWriter(bulk, JOB, ONE, chunk_bytes=chunk_bytes)
        for part in archive.parts:
            if isinstance(part, Cut):
                await writer.cut(part.element)
            else:
                await writer.feed(part)
        manifest = a_manifest(JOB, ONE, await writer.finish())
        sink = FileSink(tmp_path / "cached")
        with await open_result(ResultReader(other, JOB, sink), sink, manifest, no_waiting) as result:
            assert result["loss"] == 0.5
            opened_bytes = result.fetched_bytes
            rows = max(1, layers * 400 // 100)  # 1 %, in one piece
            layer = layers // 2
            wanted = acts.reshape(-1, 2048)[layer * 400 : layer * 400 + rows]
            whole, rest = divmod(rows, 400)
            got = [await result["acts"].at(slice(layer, layer + whole))] if whole else []
            if rest:
                got.append((await result["acts"].at(layer + whole, slice(0, rest)))[None])
            assert_same(torch.cat([part.reshape(-1, 2048) for part in got]), wanted)
            print(f"{result.fetched_bytes:,} of {manifest.archive_bytes:,} bytes, {opened_bytes:,} to open it")
            assert result.fetched_bytes < 0.02 * manifest.archive_bytes
    finally:
        await bulk.close()
        await other.close()
        await connection.close()
        server.kill()
