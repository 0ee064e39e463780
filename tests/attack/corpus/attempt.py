"""What an attempt to break out is, and the source that carries many of them out in one process.

The same source runs in two places: as the block of a job in a confined runner (`test_mesh_attacks`), where every attempt
must end in the refusal that its row names, and in the victim (`victim.py`), where nothing confines it and every attempt
must succeed. A script that reaches its end has escaped; it checks by itself that it got what it was after.
"""

from __future__ import annotations

from dataclasses import dataclass

ESCAPED = "escaped"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt. `script` may use the names of the world (`WORLD`) and of the prelude."""

    name: str
    script: str
    refusal: str = "EPERM"
    """The refusal's errno by name; several with a bar between them."""
    harmless: str = ""
    """Why the script does no harm even where nothing confines it; such a one counts as no attack."""
    kills: str = ""
    """Whom the script ends in the victim's world: HOST or AGENT."""
    root: bool = False
    """Unconfined, it needs root."""

    def refused_as(self, profile: str) -> frozenset[str]:
        """Return the outcomes that mean "contained" under `profile`.

        In a mount namespace of its own a path may not exist at all, or be on a file tree that nobody can write.
        """
        names = set(self.refusal.split("|"))
        if not profile.startswith("base"):
            names |= {"ENOENT", "EROFS"} if "EACCES" in names else set()
        return frozenset(f"refused: {name}" for name in names)


WORLD = ("HOST", "AGENT", "SECRET", "KEY", "STATE", "OTHER", "TARGET", "SCRATCH", "PORT", "UNIX", "TOKEN")
"""Names that every script may use: process ids of the model host and the agent, a file with a secret that anybody may
read, the site's key, the agent's folder, another model's folder, a file and a folder that anybody may write, a TCP port and
a unix socket on which somebody listens, and (backwards) a secret of the agent's environment."""

PRELUDE = """
import ctypes, errno, fcntl, mmap, os, platform, resource, signal, socket, stat, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"

def call(x86, arm, *arguments):
    ctypes.set_errno(0)
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    libc.syscall.restype = ctypes.c_long
    got = libc.syscall(ctypes.c_long(x86 if X86 else arm), *values)
    if got < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return got

def sock():
    for number in range(3, 256):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                return number
        except OSError:
            pass
    raise AssertionError("no socket")

def address(data):
    return ctypes.addressof(ctypes.c_char.from_buffer(data))

def vector(where, size):
    return struct.pack("QQ", where, size)

def nothing_found():
    raise OSError(errno.ENODATA, "there was nothing to find")

def in_a_child():
    if os.fork() == 0:
        os._exit(0)

def tried(script):
    scope = dict(globals())
    try:
        exec(script, scope)
        return "escaped"
    except socket.gaierror as error:
        return "refused: EAI"
    except OSError as error:
        return f"refused: {errno.errorcode.get(error.errno, error.errno)}"
    except BaseException as error:
        return f"wrong attempt: {error!r}"
"""


def source(attempts: tuple[Attempt, ...], world: dict[str, object]) -> str:
    """Return a source that tries all `attempts` in turn and leaves `outcome`, by name."""
    values = "".join(f"{name} = {world[name]!r}\n" for name in WORLD)
    scripts = {attempt.name: attempt.script for attempt in attempts}
    return f"{PRELUDE}\n{values}\noutcome = {{name: tried(script) for name, script in {scripts!r}.items()}}\n"
