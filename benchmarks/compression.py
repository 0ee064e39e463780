"""What each way of saving bytes does for real activations, at four links; a table and a plot.

    python -m benchmarks.compression [--runs 3] [--write]

Hidden states of all layers of SmolLM2-135M over a text, float32 and bfloat16, are stored through a rate-limited link by what a site
uses, on a real broker, and read on the other side; the clock runs from the first byte to the last that was verified.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import secrets
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.link import Link
from benchmarks.page import put_section
from benchmarks.run import ROOT, machine

MB = 1_000_000
LINKS = {10: 4, 100: 24, 1_000: 96, 10_000: 192}
"""Mbit/s, and the MB of activations that are sent through it."""
LOSSLESS = ("off", "fast", "best", "auto")
WIRE = ("float16", "bfloat16", "int8")
PLOT = "compression.png"


def main() -> None:
    """Measure and print; with `--write` into docs/benchmarks.md, with the plot beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    acts = activations()
    found: dict[tuple[int, str, str], tuple[float, float]] = {}
    for mbit in LINKS:
        asyncio.run(measure(mbit, acts, given.runs, found))
    page = render(found, given.runs)
    print(page)
    if given.write:
        plot(found, ROOT / "docs" / PLOT)
        put_section("compression", page, ROOT / "docs" / "benchmarks.md")


def activations() -> Any:
    """Hidden states of all layers, float32: [layers, tokens, 576]."""
    import torch

    from edif_mesh.models import DEMO_MODEL, fetch_demo
    from tests.models import cache

    os.environ["HF_HUB_CACHE"] = str(cache())
    found = fetch_demo(cache(), lambda text, part: None)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(found.path)
    model = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    text = (ROOT / "docs" / "reliability.md").read_text() + (ROOT / "docs" / "security.md").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1400]
    print(f"activations of {DEMO_MODEL} over {ids.shape[1]} tokens", flush=True)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    return torch.stack([state[0] for state in states[1:]]).contiguous()


async def measure(mbit: int, acts: Any, runs: int, found: dict[tuple[int, str, str], tuple[float, float]]) -> None:
    """Fill `found` with (seconds, MB stored) for every data and setting at one link."""
    import torch

    from edif_mesh.results.choice import LinkEstimate
    from edif_mesh.transport.bulk import NatsBulk
    from edif_mesh.transport.nats_bus import connect
    from edif_mesh.wire import subjects
    from tests.contract.nats_starter import NatsServer

    with tempfile.TemporaryDirectory(prefix="edif-bench-") as folder:
        server = NatsServer(Path(folder))
        server.start()
        connection = await connect(server.url, name="bench")
        await connection.streams.ensure(subjects.STREAMS, max_bytes={spec.name: 900 << 20 for spec in subjects.STREAMS})
        near = NatsBulk.beside(connection)
        with Link(server.url.rpartition("/")[2], mbit=mbit) as link:
            far = NatsBulk(f"nats://{link.address}", name="site")
            await far.lane()
            estimate = LinkEstimate()  # an agent keeps it for all results
            for name, data in (("float32", acts), ("bfloat16", acts.to(torch.bfloat16))):
                times: dict[str, list[float]] = {}
                stored: dict[str, float] = {}
                values = _sized(data, LINKS[mbit] * MB)
                settings = [*LOSSLESS, *(WIRE if name == "float32" else ("int8",))]
                for number in range(runs + 1):
                    for setting in settings:
                        seconds, size = await _send(far, near, connection, values, setting, estimate)
                        if number or mbit == 10:  # the slowest link needs no warm-up
                            times.setdefault(setting, []).append(seconds)
                        stored[setting] = size
                    if mbit == 10:
                        break
                for setting in settings:
                    found[mbit, name, setting] = statistics.median(times[setting]), stored[setting] / MB
                    print(
                        f"{mbit:>6} Mbit/s {name:<9} {setting:<9} {statistics.median(times[setting]):7.2f} s {stored[setting] / MB:7.2f} MB",
                        flush=True,
                    )
            await far.close()
        await near.close()
        await connection.close()
        server.kill()


def _sized(data: Any, size: int) -> list[Any]:
    """Layers of the activations, each a tensor of its own, some times over, that take about `size` bytes."""
    each = data[0].numel() * data.element_size()
    layers = max(1, size // each)
    return [data[number % len(data)].clone() for number in range(layers)]


async def _send(far: Any, near: Any, connection: Any, values: Any, setting: str, estimate: Any) -> tuple[float, int]:
    from edif_mesh.domain.ids import AttemptNumber, JobId
    from edif_mesh.results.archive import Cut, plan
    from edif_mesh.results.choice import Choice
    from edif_mesh.results.forms import ChunkForms, FormOpener
    from edif_mesh.results.transfer import ResultWriter
    from edif_mesh.results.transfer_read import ResultReader
    from edif_mesh.results.transfer_sinks import BufferSink
    from edif_mesh.wire import subjects
    from tests.builders_transfer import a_manifest

    job, one = JobId("j" + secrets.token_hex(12)[:23]), AttemptNumber(1)
    wire = setting if setting in WIRE else ""
    began = time.perf_counter()
    writer = ResultWriter(far, job, one, form=ChunkForms(Choice("auto" if wire else setting, estimate)))
    for part in plan({"acts": values}, wire_dtype=wire).parts:
        if isinstance(part, Cut):
            await writer.cut(part.element)
        else:
            await writer.feed(memoryview(part).toreadonly())
    parts = await writer.finish()
    await ResultReader(near, job, BufferSink(), opener=FormOpener()).read(a_manifest(job, one, parts))
    took = time.perf_counter() - began
    await connection.streams.purge(subjects.RESULTS_STREAM, subjects.result_chunks(job))
    return took, parts.index.stored_bytes


def render(found: dict[tuple[int, str, str], tuple[float, float]], runs: int) -> str:
    """Return the section of the page."""
    lines = [
        "## Fewer bytes",
        "",
        f"Measured with `python -m benchmarks.compression` on {datetime.date.today().isoformat()}: {machine()}. Hidden states of SmolLM2-135M, "
        f"site to broker through a rate-limited link, then to a reader; medians of {runs} (10 Mbit/s: 1). Lossless settings, then dtypes on "
        "the wire (with `auto` compression, which the site had learnt the link for). `int8` gave way to `bfloat16` (here: to the values as they are) "
        "in the layers whose few huge numbers would have turned all others into zeros. At 10 Gbit/s this machine, not the link, is the limit.",
        "",
        "| link | values | setting | seconds | MB/s of values | bytes saved | time won over `off` | auto within 10 % of the best lossless |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (mbit, name, setting), (seconds, stored) in found.items():
        off, plain = found[mbit, name, "off"]
        best = min(found[mbit, name, s][0] for s in LOSSLESS)
        verdict = ("yes" if seconds <= 1.1 * best else f"NO: {seconds / best:.2f}") if setting == "auto" else ""
        lines.append(
            f"| {mbit:,} Mbit/s | {name} | {setting} | {seconds:.2f} | {plain / seconds:.1f} | {100 * (1 - stored / plain):.0f} % | "
            f"{100 * (1 - seconds / off):.0f} % | {verdict} |"
        )
    return "\n".join([*lines, "", f"![Seconds of each setting beside `off`, by link]({PLOT})", ""])


def plot(found: dict[tuple[int, str, str], tuple[float, float]], path: Path) -> None:
    """Draw the time of each setting in parts of the time of `off`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, name in zip(axes, ("float32", "bfloat16"), strict=True):
        settings = list(dict.fromkeys(s for _, n, s in found if n == name))
        for place, setting in enumerate(settings):
            parts = [found[mbit, name, setting][0] / found[mbit, name, "off"][0] for mbit in LINKS]
            width = 0.8 / len(settings)
            at = [number + (place - (len(settings) - 1) / 2) * width for number in range(len(LINKS))]
            axis.bar(at, parts, width, label=setting, color=f"C{place}" if setting != "auto" else "black")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(LINKS)), [f"{mbit:,} Mbit/s" for mbit in LINKS])
        axis.set_title(f"SmolLM2 hidden states, {name}")
        axis.legend(fontsize=8, ncols=2)
    axes[0].set_ylabel("time, in parts of `off`")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
