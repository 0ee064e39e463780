"""Start a command as an ordinary user, from a test that runs as root: `python -m tests.ordinary_user UID COMMAND...`

The interpreter or this checkout may lie in a folder that only root can enter (a home of root). In a mount
namespace of its own, the command then sees such a folder as one that holds the ways to them and nothing else.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UID = 61_007
"""Belongs to nobody, and is not among the ids that runners of root's agents take."""
_ROOT = Path(__file__).resolve().parents[1]
_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _PRIVATE, _BIND = 0x20000, 0x44000, 0x5000


def needed() -> list[Path]:
    """Return the folders that a mesh reads: interpreter, environment, this checkout."""
    places = (sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)), _ROOT)
    return sorted({Path(os.path.realpath(place)) for place in places} | {Path(sys.prefix).absolute()})


def closed_to_others() -> list[str]:
    """Return which of them an ordinary user could not read even when led there: a test then cannot run as one."""
    return [str(path) for path in (*needed(), Path(os.__file__).parent) if path.stat().st_mode & 0o005 != 0o005]


@contextmanager
def cache_for_everybody(repo_id: str) -> Iterator[Path]:
    """A Hugging Face cache with one model of the tests' own, which every user of this machine may read."""
    from tests.models import cache  # which imports torch; whoever becomes another user does without

    name = f"models--{repo_id.replace('/', '--')}"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(cache() / name, Path(folder) / name)
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Path(folder)


def run_as_ordinary_user(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` as a user who is nobody here; needs root. `options` as for `subprocess.run`."""
    environment = {
        **os.environ, "PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.ordinary_user", str(UID), sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, **{"timeout": 120, **options}
    )


def main() -> None:
    """Open the ways, become the user, become the command."""
    user = int(sys.argv[1])
    _do(_libc.unshare(_NEWNS))
    _do(_libc.mount(b"none", b"/", None, _PRIVATE, None))
    _open_ways(needed())
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    os.execvp(sys.argv[2], sys.argv[2:])


def _open_ways(places: list[Path]) -> None:
    behind: dict[Path, list[tuple[Path, int]]] = defaultdict(list)
    for place in places:
        closed = [folder for folder in reversed(place.parents) if not folder.stat().st_mode & 0o001]
        if closed:
            behind[closed[0]].append((place, os.open(place, os.O_PATH)))
    for folder, hidden in behind.items():
        _do(_libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, b"mode=755"))
        for place, number in hidden:
            place.mkdir(parents=True, exist_ok=True)
            _do(_libc.mount(f"/proc/self/fd/{number}".encode(), str(place).encode(), None, _BIND, None))
            os.close(number)


def _do(result: int) -> None:
    if result != 0:
        raise SystemExit(f"An ordinary user could not be made: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
