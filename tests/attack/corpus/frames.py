"""Forged frames: a job that speaks for its runner on the runner's own socket. It can end or spoil its own job, no more."""

from __future__ import annotations

from dataclasses import dataclass

from tests.attack.corpus.attempt import PRELUDE

FRAMES_PRELUDE = (
    PRELUDE
    + """
import json
JOB, WARM, READY, STARTED, LOG, RESULT, DONE, FAILED = 1, 2, 10, 11, 12, 13, 14, 15
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
    F("a result of 1 TB", "say(RESULT, struct.pack('<Q', 1 << 40))", "1099511627776"),
    F("a result of the largest number", "say(RESULT, b'\\xff' * 8)", "18446744073709551615"),
    F("a result of nothing", "say(RESULT, bytes(8))", "a result of 0 bytes"),
    F("a result without its size", "say(RESULT, b'x')", "claims 1 bytes"),
    F("done before a result", "say(DONE)", "DONE where"),
    F("done with a body", "say(DONE, b'12345')", "claims 5 bytes"),
    F("two results", "say(RESULT, struct.pack('<Q', 4) ); raw(b'abcd'); say(RESULT, struct.pack('<Q', 4))", "RESULT where"),
    F("a result that stops halfway", "say(RESULT, struct.pack('<Q', 1 << 20)); raw(b'abcd'); os._exit(0)", "died without a result", "runner_crashed"),
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
    return (
        f"{FRAMES_PRELUDE}\narchive = {archive!r}\nsay(RESULT, struct.pack('<Q', len(archive)))\nraw(archive)\nsay(DONE)\n"
        f"{after}\ntime.sleep(30)\n"
    )
