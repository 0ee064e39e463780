"""`edif show JOB --values` and `edif fetch JOB --only`: of a result, only what is asked for is fetched."""

from __future__ import annotations

from pathlib import Path

from edif_mesh.cli.exit_codes import OK
from edif_mesh.cli.render import as_json, gigabytes, say, table
from edif_mesh.cli.selection import select
from edif_mesh.client.blocking import BlockingMesh
from edif_mesh.errors import ConfigError, ResultError


def show_values(*, job: str, json: bool) -> int:
    """List what was saved, without fetching it."""
    with BlockingMesh() as mesh:
        handle = mesh.job(job)
        handle.status()
        with handle.open() as result:
            found, fetched_bytes = result.summary(), result.fetched_bytes
    if json:
        as_json(
            {"job": job, "values": [{"name": n, "what": what} for n, what in found], "fetched_bytes": fetched_bytes}
        )
    else:
        table(("NAME", "WHAT"), found, empty="Nothing was saved.")
    return OK


def fetch_values(*, job: str, output: Path, only: tuple[str, ...], json: bool) -> int:
    """Fetch what is named, verify it, and write it as safetensors."""
    from edif_mesh.results.export import holds, leaves, to_safetensors

    if output.suffix != ".safetensors" or output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"{output}: with --only, choose a file in a folder that exists, named .safetensors.")
    temporary = output.with_name(output.name + ".part")
    with BlockingMesh() as mesh:
        handle = mesh.job(job)
        handle.status()
        with handle.open() as result:
            chosen = select(dict(leaves(result)), only)
            if none := [name for name, leaf in chosen.items() if not holds(leaf)]:
                raise ResultError(
                    f"{', '.join(none)}: no tensor that safetensors holds. `edif show {job} --values` shows it."
                )
            try:
                to_safetensors(chosen, temporary)
                temporary.replace(output)
            finally:
                temporary.unlink(missing_ok=True)
            fetched_bytes = result.fetched_bytes
    size = output.stat().st_size
    if json:
        as_json({"job": job, "file": str(output), "bytes": size, "fetched_bytes": fetched_bytes, "names": list(chosen)})
    else:
        say(f"{output}: {gigabytes(size)}, verified; {gigabytes(fetched_bytes)} were fetched for it.")
    return OK
