"""`edif jobs | show | why | cancel | logs | fetch`."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from edif_mesh.cli.exit_codes import FAILED, OK, exit_code
from edif_mesh.cli.render import ago, as_json, complain, err, gigabytes, say, seconds, table
from edif_mesh.client.mesh import Mesh
from edif_mesh.domain.attempt import Receipt
from edif_mesh.domain.job import JobStatus
from edif_mesh.errors import ConfigError, EdifError, NotFoundError, RefusedError
from edif_mesh.wire.messages import JobSnapshot


def show_jobs(*, limit: int, json: bool) -> int:
    """A table of the researcher's own jobs."""

    async def ask() -> tuple[JobSnapshot, ...]:
        async with await Mesh.connect(name="cli") as mesh:
            return await mesh.jobs(limit)

    found = asyncio.run(ask())
    if json:
        as_json(found)
        return OK
    table(
        ("JOB", "STATE", "MODEL", "SUBMITTED", "KEPT", "WHAT"),
        [(j.job, j.status.value, j.model.repo_id, ago(j.submitted_at_ms), _kept(j), _short(j.text)) for j in found],
        empty="You have no jobs here.",
    )
    return OK


def show_job(*, job: str, json: bool) -> int:
    """One job in full."""
    found = asyncio.run(_status(job))
    if json:
        as_json(found)
        return OK
    say(f"{found.job}  {found.status.value}  {found.model.repo_id}" + (f"  ({found.name})" if found.name else ""))
    say(found.text.splitlines()[0] if found.text else "")
    say(f"Submitted {ago(found.submitted_at_ms)}, last change {ago(found.updated_at_ms)}. Result kept: {_kept(found)}.")
    table(
        ("ATTEMPT", "SITE", "STATE", "RUN TIME", "PEAK MEMORY", "RESULT", "WHY"),
        [
            (
                str(a.attempt),
                a.site,
                a.status.value,
                seconds(a.receipt.wall_ms if a.receipt else None),
                gigabytes(a.receipt.peak_memory_bytes) if a.receipt else "-",
                gigabytes(a.receipt.result_bytes) if a.receipt else "-",
                _short(a.failure.line if a.failure else a.detail) or "-",
            )
            for a in found.attempts
        ],
        empty="No attempt yet.",
    )
    for attempt in found.attempts:
        if attempt.receipt is not None:
            say(f"\nReceipt of attempt {attempt.attempt}, by {attempt.site}: {_receipt(attempt.receipt)}")
    if found.failure is not None:
        say("\n" + found.failure.text)
    return OK


def _kept(snapshot: JobSnapshot) -> str:
    """How large its result is at the mesh, and until when it is there."""
    if snapshot.deleted_at_ms is not None:
        return "deleted"
    if not snapshot.result_bytes or snapshot.keep_until_ms is None:
        return "-"
    return f"{gigabytes(snapshot.result_bytes)} until {time.strftime('%d %b', time.localtime(snapshot.keep_until_ms / 1000))}"


def _receipt(receipt: Receipt) -> str:
    device = f" and {gigabytes(receipt.device_memory_bytes)} of its memory" if receipt.device_memory_bytes else ""
    load = f"; it had waited {seconds(receipt.load_ms)} for the model to load" if receipt.load_ms else ""
    return (
        f"{seconds(receipt.wall_ms)} run time, {seconds(receipt.cpu_ms)} processor time on {receipt.device or '?'}{device}, "
        f"{gigabytes(receipt.peak_memory_bytes)} memory at its highest, {gigabytes(receipt.result_bytes)} result, "
        f"{receipt.log_bytes:,} bytes printed, in the sandbox {receipt.sandbox or '?'}{load}."
    )


def show_why(*, job: str, json: bool) -> int:
    """Every site's verdict."""
    found = asyncio.run(_status(job, explain=True))
    if json:
        as_json(found.why)
        return OK
    say(f"{found.job}: {found.text.splitlines()[0] if found.text else found.status.value}")
    rows = []
    for verdict in sorted(found.why, key=lambda v: (v.score_s is None, v.score_s or 0.0)):
        if verdict.score_s is not None:
            terms = ", ".join(f"{name} {value:g} s" for name, value in verdict.terms.items() if value)
            rows.append((verdict.site, f"{verdict.score_s:g} s", terms or "nothing to wait for"))
        else:
            rows.extend((verdict.site, r.code, r.text) for r in verdict.reasons)
    table(("SITE", "EXPECTED", "WHY"), rows, empty="No site is known.")
    return OK


def cancel_job(*, job: str, reason: str, json: bool) -> int:
    """End it, and say what it is now."""

    async def ask() -> JobSnapshot:
        async with await Mesh.connect(name="cli") as mesh:
            return await mesh.job(job).cancel(reason)

    found = asyncio.run(ask())
    as_json(found) if json else say(f"{found.job}: {found.text}")
    return OK


def delete_jobs(*, jobs: tuple[str, ...], yes: bool, json: bool) -> int:
    """Ask, then have each deleted; says how far it is."""
    if not yes and not json and sys.stdin.isatty():
        what = jobs[0] if len(jobs) == 1 else f"{len(jobs)} jobs"
        if input(f"Delete payload, result and printed lines of {what}? This cannot be undone. [y/N] ").lower() not in (
            "y",
            "yes",
        ):
            say("Nothing was deleted.")
            return FAILED

    async def ask() -> tuple[list[JobSnapshot], list[EdifError]]:
        found, refused = list[JobSnapshot](), list[EdifError]()
        async with await Mesh.connect(name="cli") as mesh:
            for job in jobs:  # one that is refused holds up no other
                try:
                    found.append(await mesh.job(job).delete())
                except (NotFoundError, RefusedError) as error:
                    refused.append(error)
        return found, refused

    found, refused = asyncio.run(ask())
    if json:
        as_json({"deleted": found, "refused": [{"code": error.code, "text": str(error)} for error in refused]})
    else:
        for snapshot in found:
            say(f"{snapshot.job}: {snapshot.text}")
        for error in refused:
            complain(str(error))
    return exit_code(refused[-1]) if refused else OK


def show_logs(*, job: str, follow: bool, json: bool) -> int:
    """Print what it printed."""

    async def read() -> list[str]:
        lines = []
        async with await Mesh.connect(name="cli") as mesh:
            handle = mesh.job(job)
            await handle.status()
            async for text in handle.logs(follow=follow):
                lines.append(text)
                if not json:
                    sys.stdout.write(text if text.endswith("\n") else text + "\n")
                    sys.stdout.flush()
        return lines

    lines = asyncio.run(read())
    if json:
        as_json({"job": job, "lines": lines})
    return OK


def fetch_result(*, job: str, output: Path, json: bool) -> int:
    """Fetch, verify, write. `.safetensors` holds the tensors, `.edif` the archive with everything."""
    if output.suffix not in (".safetensors", ".edif"):
        raise ConfigError(
            f"{output.name}: choose a name that ends in .safetensors (tensors only) or .edif (everything)."
        )
    if not output.parent.is_dir():
        raise ConfigError(f"The folder {output.parent} does not exist.")
    if output.is_dir():
        raise ConfigError(f"{output} is a folder; name a file.")
    size, left_out = asyncio.run(_fetch(job, output, quiet=json))
    if json:
        as_json({"job": job, "file": str(output), "bytes": size, "left_out": left_out})
    else:
        say(f"{output}: {gigabytes(size)}, verified.")
        if left_out:
            say(
                f"Left out, because they are no tensors: {', '.join(left_out)}. Use -o {output.stem}.edif for everything."
            )
    return OK


async def _fetch(job: str, output: Path, *, quiet: bool) -> tuple[int, list[str]]:
    """Fetch the archive into a file, which a later call goes on with; then make what was asked for."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    tensors_only = output.suffix == ".safetensors"
    archive = output.with_name(f".{output.name}.{job}.edif") if tensors_only else output
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    async with await Mesh.connect(name="cli") as mesh:
        handle = mesh.job(job)
        await handle.status()
        with Progress(*columns, console=err, disable=quiet) as bars:
            bar = bars.add_task("fetching", total=None)
            size = await handle.fetch_to(
                archive,
                on_update=lambda s: bars.update(bar, description=s.status.value.lower()),
                progress=lambda done, total: bars.update(bar, description="fetching", completed=done, total=total),
            )
    if not tensors_only:
        return size, []
    temporary = output.with_name(output.name + ".part")
    try:
        left_out = _to_safetensors(archive, temporary)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
        archive.unlink(missing_ok=True)
    return output.stat().st_size, left_out


def _to_safetensors(archive: Path, path: Path) -> list[str]:
    from safetensors import SafetensorError

    from edif_mesh.results.archive import read
    from edif_mesh.results.export import to_safetensors

    try:
        return to_safetensors(read(archive), path)
    except SafetensorError as error:  # the disk: our values are tensors that it can hold
        raise ConfigError(f"{path} could not be written: {error}") from error


async def _status(job: str, *, explain: bool = False) -> JobSnapshot:
    async with await Mesh.connect(name="cli") as mesh:
        return await mesh.job(job).status(explain=explain)


def _short(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def failed(snapshot: JobSnapshot) -> int:
    """Return the exit code that a job's end asks for."""
    return OK if snapshot.status is JobStatus.SUCCEEDED else FAILED
