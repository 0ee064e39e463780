"""Bombs and changed state without a runner around them: plain forked processes of a small interpreter, bounded only here.

python -m tests.attack.explosions bombs     prints {"bomb": what it did}
python -m tests.attack.explosions state     prints {"change": whether the next job in that process is another}
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.attack.corpus.bombs import BOMBS, LOG_BYTES, MEMORY_BYTES, RESULT_BYTES, SHORT_MS, Bomb
from tests.attack.corpus.state import REFERENCE, STATE

_ROOT = Path(__file__).resolve().parents[2]
_THREADS = 1024
_PATIENCE_S = 3


def explosions() -> dict[str, str]:
    """What each bomb did, by name."""
    return dict(_output("bombs"))


def meddling() -> dict[str, bool]:
    """Whether each change was seen by a job that ran after it in the same process."""
    return dict(_output("state"))


def _output(what: str) -> Any:
    command = [sys.executable, "-m", "tests.attack.explosions", what]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=150, cwd=_ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------- bombs


def _explode(bomb: Bomb) -> str:
    """Run one bomb in a forked process until it does more than a job may, or ends."""
    reader, writer = os.pipe()
    printed, ended = 0, False
    pid = os.fork()
    if pid == 0:
        _light(bomb, writer)
    os.close(writer)
    os.set_blocking(reader, False)
    process, began, said = psutil.Process(pid), time.monotonic(), b""
    base = process.memory_info().rss
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                piece = os.read(reader, 1 << 20)
                ended, printed, said = piece == b"", printed + len(piece), (said + piece)[-100:]
            if ended:
                break
            if printed > LOG_BYTES:
                return "printed"
            with contextlib.suppress(psutil.Error):
                if process.memory_info().rss - base > MEMORY_BYTES:
                    return "memory"
                if process.num_threads() > _THREADS:
                    return "threads"
            if time.monotonic() - began > (SHORT_MS / 1000 + 0.2 if bomb.harm == "time" else 20):
                return "time"
            time.sleep(0.002)
        return said.decode() or "dies"
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _light(bomb: Bomb, writer: int) -> None:
    """The forked process: it says `result` or `nesting` when its outcome is too large or too deep to be passed on."""
    os.dup2(writer, 1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    scope: dict[str, Any] = {}
    exec(bomb.script, scope)
    outcome = scope.get("outcome")
    size = outcome.nbytes if hasattr(outcome, "nbytes") else len(outcome) if isinstance(outcome, str) else 0
    with contextlib.suppress(OSError):
        try:
            repr(outcome) if isinstance(outcome, list | dict | tuple) else None
            os.write(writer, b"result" if size > RESULT_BYTES else b"nothing")
        except RecursionError:
            os.write(writer, b"nesting")
    os._exit(0)


# ---------------------------------------------------------------------------------------------------------------- state


def _reaches_the_next(script: str, model: Any, expected: str) -> bool:
    """Run a change and then the reference in one forked process; an error of the reference is a change too."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(_PATIENCE_S)  # a change may have the next job hang: that is harm too
        with contextlib.suppress(BaseException):
            exec(script, {"model": model})
        said = "broken"
        with contextlib.suppress(BaseException):
            scope: dict[str, Any] = {"model": model}
            exec(REFERENCE, scope)
            said = repr(scope["outcome"])
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 1 << 16).decode()
    os.close(reader)
    os.waitpid(pid, 0)
    return said != expected


def main() -> None:
    """Do what the first argument says, and print it."""
    import torch

    torch.set_num_threads(1)
    if sys.argv[1] == "bombs":
        found: dict[str, Any] = {bomb.name: _explode(bomb) for bomb in BOMBS}
    else:
        from tests.models import tiny_gpt2
        from tests.submitting import load

        model = load(tiny_gpt2())
        scope: dict[str, Any] = {"model": model}
        exec(REFERENCE, scope)
        expected = repr(scope["outcome"])
        assert not _reaches_the_next("pass", model, expected)
        found = {name: _reaches_the_next(script, model, expected) for name, script in STATE.items()}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
