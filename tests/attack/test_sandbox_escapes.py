"""What a stranger's code may try in a runner: each attempt is refused by the kernel, and the job itself goes on."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from site_agent.hosting.lender import ModelHost
from tests import models, traces
from tests.hosted import code, run, tiny_host

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Every attempt ends in a system call that is refused: `OSError`, never another error, or the attempt itself was wrong.
PRELUDE = """
import ctypes, os, platform, socket, struct, signal, threading
libc = ctypes.CDLL(None, use_errno=True)
HOST, AGENT, SECRET = {host}, {agent}, {secret!r}
X86 = platform.machine() == "x86_64"

def call(x86, arm, *arguments):
    ctypes.set_errno(0)
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    got = libc.syscall(x86 if X86 else arm, *values)
    if got < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return got

def sock():
    return next(n for n in range(3, 256) if os.path.exists("/proc") and _is_socket(n))

def _is_socket(number):
    try:
        return os.fstat(number).st_mode & 0o170000 == 0o140000
    except OSError:
        return False

try:
{attempt}
    outcome = "escaped"
except OSError as error:
    denied = error.errno in (1, 13, 38) or isinstance(error, socket.gaierror)  # EPERM, EACCES, ENOSYS
    outcome = "refused" if denied else f"wrong attempt: {{error!r}}"
except BaseException as error:
    outcome = f"wrong attempt: {{error!r}}"
"""

ATTEMPTS = {
    "read /etc/shadow": "open('/etc/shadow').read()",
    "read /etc/passwd": "open('/etc/passwd').read()",
    "read a key of the agent": "open(SECRET).read()",
    "list the agent's folder": "os.listdir(os.path.dirname(SECRET))",
    "read the host's environment": "open(f'/proc/{HOST}/environ').read()",
    "read its own environment from /proc": "open('/proc/self/environ').read()",
    "read the host's memory": "open(f'/proc/{HOST}/mem', 'rb')",
    "open its own memory for writing": "open('/proc/self/mem', 'wb')",
    "list processes": "os.listdir('/proc')",
    "read the home folder": "os.listdir(os.path.expanduser('~root'))",
    "write to /tmp": "open('/tmp/edif-escape', 'w')",
    "write to /dev/shm": "open('/dev/shm/edif-escape', 'w')",
    "write beside the library": "open(os.__file__, 'r+')",
    "make a folder": "os.mkdir('/tmp/edif-escape')",
    "delete a file": "os.unlink(os.__file__)",
    "rename a file": "os.rename(os.__file__, '/tmp/x')",
    "change a mode": "os.chmod(os.__file__, 0o777)",
    "link": "os.link(os.__file__, '/tmp/x')",
    "symlink": "os.symlink(os.__file__, '/tmp/x')",
    "change root": "os.chroot('/')",
    "change folder": "os.chdir('/')",
    "TCP": "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "IPv6": "socket.socket(socket.AF_INET6, socket.SOCK_STREAM)",
    "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "unix socket": "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)",
    "vsock": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "alg socket": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "socketpair": "socket.socketpair()",
    "resolve a name": "socket.getaddrinfo('example.org', 80)",
    "kill the host": "os.kill(HOST, signal.SIGKILL)",
    "kill the agent": "os.kill(AGENT, signal.SIGKILL)",
    "kill everybody": "os.kill(-1, signal.SIGKILL)",
    "tgkill the host": "call(234, 131, HOST, HOST, 9)",
    "tkill the host": "call(200, 130, HOST, 9)",
    "queue a signal": "call(129, 138, HOST, 9, ctypes.create_string_buffer(128))",
    "pidfd of the agent": "os.pidfd_open(AGENT)",
    "limit the agent's CPU time": "call(302, 261, AGENT, 0, struct.pack('QQ', 1, 1), None)",
    "limit the host's files": "call(302, 261, HOST, 7, struct.pack('QQ', 1, 1), None)",
    "lower the agent's priority": "os.setpriority(os.PRIO_PROCESS, AGENT, 19)",
    "pin the agent to a core": "os.sched_setaffinity(AGENT, {0})",
    "signals by F_SETOWN": "__import__('fcntl').fcntl(sock(), 8, AGENT)",
    "signals by F_SETSIG": "__import__('fcntl').fcntl(sock(), 10, 9)",
    "signals by FIOSETOWN": "__import__('fcntl').ioctl(sock(), 0x8901, struct.pack('i', AGENT))",
    "a lease on a file": "__import__('fcntl').fcntl(os.open(os.__file__, 0), 1024, 0)",
    "a lock on a file": "__import__('fcntl').flock(os.open(os.__file__, 0), 2)",
    "interfaces by ioctl": "__import__('fcntl').ioctl(sock(), 0x8912, bytes(16))",
    "ptrace the host": "call(101, 117, 16, HOST, 0, 0)",
    "ptrace itself": "call(101, 117, 0, 0, 0, 0)",
    "process_vm_readv": "call(310, 270, HOST, 0, 0, 0, 0, 0)",
    "exec": "os.execv('/bin/sh', ['sh', '-c', 'true'])",
    "fork": "os.fork()",
    "vfork": "call(58, 220, 0x4111, 0, 0, 0, 0)",
    "clone without a thread": "call(56, 220, 17, 0, 0, 0, 0)",
    "clone into namespaces": "call(56, 220, 0x10000000 | 0x10000, 0, 0, 0, 0)",
    "clone3": "call(435, 435, bytes(88), 88)",
    "run a command": "__import__('subprocess').run(['true'])",
    "memfd": "os.memfd_create('x')",
    "io_uring": "call(425, 425, 8, bytes(120))",
    "bpf": "call(321, 280, 0, bytes(64), 64)",
    "mount": "call(165, 40, b'none', b'/tmp', b'tmpfs', 0, None)",
    "new mount interface": "call(430, 430, b'tmpfs', 0)",
    "umount": "call(166, 39, b'/', 2)",
    "pivot_root": "call(155, 41, b'/', b'/')",
    "unshare user": "call(272, 97, 0x10000000)",
    "setns": "call(308, 268, 0, 0)",
    "keyring": "call(250, 219, 0, -3, 0, 0, 0)",
    "perf": "call(298, 241, bytes(128), 0, -1, -1, 0)",
    "userfaultfd": "call(323, 282, 0)",
    "modules": "call(175, 105, 0, 0, b'')",
    "handle of a file": "call(304, 265, -100, bytes(128), 0)",
    "reboot": "call(169, 142, 0, 0, 0, 0)",
    "become root": "os.setresuid(0, 0, 0)",
    "change group": "os.setresgid(0, 0, 0)",
    "be dumpable again": "call(157, 167, 4, 1, 0, 0, 0)",
    "drop the death signal": "call(157, 167, 1, 0, 0, 0, 0)",
    "another filter": "call(317, 277, 1, 0, 0)",
    "the clock": "__import__('time').clock_settime(0, 0)",
    "shared memory": "call(29, 194, 0, 4096, 0o1600)",
    "send a descriptor": "call(46, 211, sock(), bytes(56), 0)",
    "raise its own limits": "call(302, 261, 0, 9, struct.pack('qq', -1, -1), None)",
    "another model's weights": "os.listdir(os.path.dirname(CACHE))",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[ModelHost]:
    async with tiny_host(ready=2) as host:
        yield host


@pytest.mark.parametrize("name", ATTEMPTS)
async def test_an_attempt_to_reach_outside_is_refused(host: ModelHost, name: str, tmp_path: Path) -> None:
    secret = tmp_path / "site.key"
    secret.write_text("secret")
    os.chmod(secret, 0o644)
    attempt = ATTEMPTS[name].replace("CACHE", repr(str(models.cache() / "models--x")))
    source = PRELUDE.format(host=host.facts.pid, agent=os.getpid(), secret=str(secret), attempt=f"    {attempt}")
    ended = await run(host, code(source))
    host.replenish()
    assert ended.values["outcome"] == "refused"


async def test_what_an_honest_job_needs_is_there(host: ModelHost) -> None:
    source = """
import os, threading, time, json, tempfile
import torch, numpy
import xml.dom.minidom, concurrent.futures, torch.nn.utils.parametrize, transformers.models.llama.modeling_llama
got = []
thread = threading.Thread(target=lambda: got.append(torch.ones(3).sum().item())); thread.start(); thread.join()
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    got += list(pool.map(lambda n: n * 2, [1, 2]))
torch.set_num_threads(2)
(torch.ones(400, 400) @ torch.ones(400, 400)).sum()
time.sleep(0.01)
outcome = (got, os.environ.get("HOME"), sorted(n for n in os.environ if "KEY" in n or "TOKEN" in n or "PASS" in n))
"""
    assert (await run(host, code(source))).values["outcome"][0] == [3.0, 2, 4]
    host.replenish()


async def test_a_runner_holds_its_socket_and_nothing_else(host: ModelHost) -> None:
    source = """
import os
held = []
for number in range(256):
    try:
        mode = os.fstat(number).st_mode & 0o170000
    except OSError:
        continue
    held.append((number, "socket" if mode == 0o140000 else "device" if mode == 0o020000 else oct(mode)))
outcome = [kind for _, kind in held]
"""
    assert (await run(host, code(source))).values["outcome"] == ["device", "device", "device", "socket"]
    host.replenish()


async def test_the_host_and_the_next_job_live_on(host: ModelHost) -> None:
    os.kill(host.facts.pid, 0)
    assert signal.getsignal(signal.SIGTERM) is not None
    assert "hidden" in (await run(host, traces.one_read())).values
