"""Run a command as a user without any right, on a machine where the tests themselves run as root.

The interpreter may lie in a folder that only root may enter: in a mount namespace of the command's own, an empty folder
that all may enter stands in its place, with the interpreter mounted where it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.models import cache

ROOT = Path(__file__).resolve().parents[1]
UID = 54_321

_SCRIPT = r"""
import ctypes, os, sys, tempfile
libc = ctypes.CDLL(None, use_errno=True)
uid, base = int(sys.argv[1]), sys.argv[2]

def mount(source, target, kind, flags, data=None):
    if libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), data) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)

parts = os.path.realpath(base).split("/")
ways = ["/".join(parts[:n]) for n in range(2, len(parts))]
closed = next((way for way in ways if not os.stat(way).st_mode & 1), None)
if libc.unshare(0x20000) != 0:
    raise OSError(ctypes.get_errno(), "no mount namespace")
mount("none", "/", None, 0x44000)
if closed:
    kept = tempfile.mkdtemp()
    mount(base, kept, None, 4096 | 16384)
    mount("none", closed, b"tmpfs", 0, b"mode=755")
    os.makedirs(base)
    mount(kept, base, None, 4096 | 16384)
    libc.umount2(kept.encode(), 2)
    os.rmdir(kept)
for capability in range(64):
    libc.prctl(24, capability, 0, 0, 0)
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
os.execvp(sys.argv[3], sys.argv[3:])
"""


@contextmanager
def cache_for_everybody(repo_id: str) -> Iterator[Path]:
    """A Hugging Face cache with one model of the tests' own, which every user of this machine may read."""
    name = f"models--{repo_id.replace('/', '--')}"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(cache() / name, Path(folder) / name)
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Path(folder)


def run_as_ordinary_user(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` as a user who is nobody here; needs root. `options` as for `subprocess.run`."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", _SCRIPT, str(UID), os.path.realpath(sys.base_prefix), sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, **{"timeout": 120, **options}
    )
