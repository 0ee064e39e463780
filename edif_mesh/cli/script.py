"""The Python in which `edif run` and `edif submit` run a researcher's script.

Two things differ from plain `python script.py`: a model id that is in the local Hugging Face cache is taken as it is
written (nnsight otherwise asks the hub for its canonical spelling), and under `submit` a remote trace sends its job,
prints the id, and goes on without the values.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from typing import Any

from edif_mesh.models import hub_cache


class LocalIds(dict[str, str]):
    """nnsight's table of canonical ids, which knows every model of the local cache."""

    def __missing__(self, repo_id: str) -> str:
        if (hub_cache() / f"models--{repo_id.replace('/', '--')}").is_dir():
            return repo_id
        raise KeyError(repo_id)

    def __contains__(self, repo_id: object) -> bool:
        try:
            self[str(repo_id)]
        except KeyError:
            return False
        return True


def main() -> None:
    """Run `sys.argv[1]` as a script."""
    from nnsight.modeling import huggingface

    huggingface._ID_CACHE = LocalIds(huggingface._ID_CACHE)
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    if os.environ.get("EDIF_WAIT") != "0":
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    sent: list[str] = []
    _only_submit(sent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except (NameError, UnboundLocalError, AttributeError, TypeError) as error:
        if not sent:
            raise
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        print(f"The script stopped at line {line}, which needs a result. {len(sent)} job(s) sent.", file=sys.stderr)


def _only_submit(sent: list[str]) -> None:
    from nnsight.intervention.backends.remote import RemoteBackend

    def submit(self: Any, tracer: Any = None) -> None:
        self.blocking, self.job_id = False, None
        self.display.enabled = False
        self.submit(tracer)
        sent.append(self.job_id)
        print(self.job_id, flush=True)

    RemoteBackend.__call__ = submit


if __name__ == "__main__":
    main()
