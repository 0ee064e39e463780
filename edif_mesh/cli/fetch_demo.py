"""`edif models fetch-demo`."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from edif_mesh.cli.exit_codes import OK
from edif_mesh.cli.render import as_json, err, say
from edif_mesh.models import fetch_demo


def run_fetch_demo(*, json: bool) -> int:
    """Fetch with a progress bar, check the digest, say where it lies."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, disable=json) as bars:
        bar = bars.add_task("starting", total=1.0)
        model = fetch_demo(progress=lambda text, part: bars.update(bar, description=text, completed=part))
    if json:
        as_json({"model": model.repo_id, "revision": model.revision, "path": str(model.path)})
    else:
        say(f"{model.repo_id} (revision {model.revision[:12]}) is ready in {model.path}")
    return OK
