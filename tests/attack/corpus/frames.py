"""Forged frames: a job that speaks for its runner on the runner's own socket. It can end or spoil its own job, no more."""

from __future__ import annotations

from dataclasses import dataclass

from tests.attack.corpus.attempt import PRELUDE

FRAMES_PRELUDE = (
    PRELUDE
    + """
import json
JOB, WARM, READY, STARTED, LOG, DONE, FAILED, DATA, CUT = 1, 2, 10, 11, 12, 14, 15, 17, 18
SOCK = sock()

def raw(data):
    data = memoryview(data)
    while data:
        data = data[os.write(SOCK, data):]

def say(kind, data=b"", length=None):
    raw(struct.pack("<BI", kind, len(data) if length is None else length) + data)

def failed(**fields):
    say(FAILED, json.dumps(fields).encode())
"""
)


@dataclass(frozen=True, slots=True)
class Forgery:
    """One conversation that no honest runner has; the job ends with `code`, and its sentence holds `says`."""

    name: str
    script: str
    says: str
    code: str = "protocol"

    def source(self) -> str:
        """The script with its prelude; it then waits to be killed."""
        return f"{FRAMES_PRELUDE}\n{self.script}\ntime.sleep(30)\n"


F = Forgery
FORGERIES = (
    F("a frame of another kind", "say(99)", "unknown kind 99"),
    F("a frame that only the agent sends", "say(JOB, b'{}')", "unknown kind 1"),
    F("ready again", "say(READY)", "READY where"),
    F("started twice", "say(STARTED)", "STARTED where"),
    F("a line of 4 GB", "say(LOG, b'', 0xFFFFFFFF)", "claims 4294967295 bytes"),
    F("a piece of 4 GB", "say(DATA, b'', 0xFFFFFFFF)", "claims 4294967295 bytes"),
    F("pieces beyond the limit", "for _ in range(40): say(DATA, bytes(1 << 19))", "are allowed"),
    F("an empty piece", "say(DATA)", "a result of 0 bytes"),
    F("a cut without its byte", "say(CUT)", "claims 0 bytes"),
    F("a frame of version 1", "say(13, bytes(8))", "unknown kind 13"),
    F("done before a result", "say(DONE)", "DONE where"),
    F("done with a body", "say(DONE, b'12345')", "claims 5 bytes"),
    F("done after cuts alone", "say(CUT, b'\\0'); say(CUT, b'\\0'); say(DONE)", "DONE where"),
    F("started again in the middle", "say(DATA, b'abcd'); say(STARTED)", "STARTED where"),
    F("a piece that stops halfway", "say(DATA, b'abcd', 1 << 20); os._exit(0)", "died without a result", "runner_crashed"),
    F("a failure that blames the host", "failed(code='host_lost', text='The site is bad.')", "without a known code"),
    F("a failure that blames the sandbox", "failed(code='sandbox', text='The site is bad.')", "without a known code"),
    F("a failure of the agent's own kind", "failed(code='wall_time', text='x')", "without a known code"),
    F("a failure that is not JSON", "say(FAILED, b'\\xff\\x00')", "not JSON"),
    F("a failure that nests", "say(FAILED, b'[' * 200_000)", "not JSON"),
    F("a failure that is a list", "say(FAILED, b'[1]')", "without a known code"),
    F("a failure of 1 MB", "say(FAILED, b'x' * (1 << 20))", "claims 1048576 bytes"),
    F("thousands of lines", "for _ in range(100_000): say(LOG, b'line\\n')", "printed beyond its limit"),
    F("thousands of empty lines", "for _ in range(100_000): say(LOG)", "printed beyond its limit"),
    F("garbage", "raw(b'\\xff' * 65536)", "unknown kind 255"),
    F("half a frame and then silence", "raw(b'\\x0c')", "its limit is", "wall_time"),
    F("hanging up", "os.close(SOCK)", "closed its socket"),
    F("hanging up one way", "call(48, 210, SOCK, 1)", "closed its socket"),
)  # fmt: skip


def sends(archive: bytes, after: str = "") -> str:
    """Return a source that sends an archive of its own making as the result, is done, and then does `after`."""
    return f"{FRAMES_PRELUDE}\narchive = {archive!r}\nsay(DATA, archive)\nsay(DONE)\n{after}\ntime.sleep(30)\n"
