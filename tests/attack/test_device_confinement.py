"""What a runner on a GPU may do beyond one on the CPU: requests to the driver, its device files, threads that CUDA starts. No more.

Each case is a process of its own that confines itself for good; devices that every machine has stand for those of a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edif_mesh.domain.site import SandboxProfile
from site_agent.runner.confine import SandboxSettings
from site_agent.runner.devices import for_cuda, shown
from site_agent.runner.landlock import landlock_abi
from site_agent.runner.selftest import try_profile

ROOT = Path(__file__).resolve().parents[2]

TRY = """
import ctypes, errno, json, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def name(action):
    try: return action() or "done"
    except OSError as error: return errno.errorcode[error.errno]
def ioctl(descriptor, request):
    ctypes.set_errno(0)
    libc.ioctl(descriptor, ctypes.c_ulong(request), ctypes.create_string_buffer(256))
    return errno.errorcode.get(ctypes.get_errno(), "done")
"""


def outcome(source: str) -> Any:
    """Run `source` after TRY; it prints JSON last."""
    done = subprocess.run([sys.executable, "-c", TRY + source], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


REQUESTS = """
from site_agent.runner.seccomp import install_filter
ours, theirs = socket.socketpair()
pipe, _ = os.pipe()
assert libc.prctl(38, 1, 0, 0, 0) == 0
install_filter(devices=DEVICES)
tried = {
    "driver": ioctl(pipe, 0xC0384600 | 0x2A), "driver, no data": ioctl(pipe, 0x46D2), "unified memory": ioctl(pipe, 25),
    "unified memory begins": ioctl(pipe, 0x30000001), "unified memory ends": ioctl(pipe, 0x30000002),
    "is it a terminal": ioctl(pipe, 0x5401), "type into a terminal": ioctl(pipe, 0x5412),
    "whose signals": ioctl(ours.fileno(), 0x8901), "names of interfaces": ioctl(ours.fileno(), 0x8912),
    "next to unified memory": ioctl(pipe, 0x30000003), "beyond the small ones": ioctl(pipe, 0x100),
    "next to the driver": ioctl(pipe, 0x4701), "socket": name(lambda: socket.socket() and None), "fork": name(lambda: os.fork() and None),
}
print(json.dumps(tried))
"""
OPENED = {"driver", "driver, no data", "unified memory", "unified memory begins", "unified memory ends"}


def test_only_requests_of_a_gpus_driver_are_opened_and_for_runners_on_a_gpu_only() -> None:
    with_gpu, without = (outcome(REQUESTS.replace("DEVICES", text)) for text in ("True", "False"))
    assert {name for name in with_gpu if with_gpu[name] != without[name]} == OPENED
    assert all(with_gpu[name] == "ENOTTY" and without[name] == "EPERM" for name in OPENED)  # a pipe has none of them
    refused = {
        "is it a terminal": "ENOTTY",
        **dict.fromkeys(set(with_gpu) - OPENED - {"is it a terminal"}, "EPERM"),
    }
    assert {name: with_gpu[name] for name in refused} == refused


@pytest.mark.skipif(landlock_abi() < 1, reason="this kernel has no Landlock")
def test_a_device_file_that_is_named_can_be_written_and_no_other_one() -> None:
    tried = outcome(
        """
from site_agent.runner.landlock import restrict_files
assert libc.prctl(38, 1, 0, 0, 0) == 0
restrict_files(("/proc/cpuinfo",), ("/dev/zero",))
print(json.dumps({
    "the device": name(lambda: os.write(os.open("/dev/zero", os.O_RDWR), b"x") and None),
    "another": name(lambda: os.open("/dev/full", os.O_RDWR) and None),
    "another, to read": name(lambda: os.open("/dev/full", os.O_RDONLY) and None),
    "read only": name(lambda: os.open("/proc/cpuinfo", os.O_RDONLY) and None),
    "to write what may be read": name(lambda: os.open("/proc/cpuinfo", os.O_RDWR) and None),
}))
"""
    )
    assert tried == {"the device": "done", "another": "EACCES", "another, to read": "EACCES", "read only": "done", "to write what may be read": "EACCES"}  # fmt: skip


@pytest.mark.skipif(landlock_abi() < 1, reason="this kernel has no Landlock")
def test_a_thread_started_while_weights_are_mapped_is_confined_like_the_first_one() -> None:
    """CUDA starts threads of its own. Landlock holds for a thread and those it starts later: it has to come before them."""
    tried = outcome(
        """
import threading
from site_agent.runner.confine import SandboxSettings, confine, interpreter_folders
ours, theirs = socket.socketpair()
there, borrowed = os.memfd_create("weights"), []
go, found = threading.Event(), {}
def work():
    go.wait(30)
    found["file"] = name(lambda: os.open("/etc/hostname", os.O_RDONLY) and None)
    found["socket"] = name(lambda: socket.socket() and None)
    found["signal"] = name(lambda: os.kill(os.getppid(), 0))
thread = threading.Thread(target=work)
def prepare():
    os.fstat(there)
    borrowed.append("was there")
    thread.start()
if os.fork() == 0:
    confine(SandboxSettings(interpreter_folders()), theirs.fileno(), prepare=prepare, borrowed=(there,))
    go.set(); thread.join()
    borrowed.append(name(lambda: os.fstat(there) and None))
    theirs.sendall(json.dumps({**found, "borrowed": borrowed}).encode())
    os._exit(0)
theirs.close()
print(ours.recv(4096).decode())
"""
    )
    assert tried == {"file": "EACCES", "socket": "EPERM", "signal": "EPERM", "borrowed": ["was there", "EBADF"]}


@pytest.mark.skipif(bool(try_profile(SandboxProfile.NAMESPACED)), reason="no namespaces here")
def test_a_file_tree_of_its_own_shows_the_devices_that_are_named() -> None:
    tried = outcome(
        """
from edif_mesh.domain.site import SandboxProfile
from site_agent.runner.confine import interpreter_folders
from site_agent.runner.namespaces import Enclosure
enclosure = Enclosure(SandboxProfile.NAMESPACED)
enclosure.enter()
enclosure.close_off(interpreter_folders(), ("/dev/zero",))
print(json.dumps({
    "there": sorted(os.listdir("/dev")),
    "written": name(lambda: os.write(os.open("/dev/zero", os.O_RDWR), b"x") and None),
    "proc": os.path.exists("/proc/self"),
}))
"""
    )
    assert tried == {"there": ["null", "zero"], "written": "done", "proc": False}


def test_a_runner_on_a_gpu_is_shown_no_file_of_other_processes() -> None:
    settings = for_cuda(SandboxSettings(("/usr/lib",)))
    added = settings.readable[1:]
    assert "/proc" not in added
    assert [path for path in added if path.startswith("/proc/self")] == ["/proc/self"]
    assert all(path.startswith(("/proc/", "/sys/", "/usr/local/nvidia", "/usr/local/cuda")) for path in added)
    assert all(path.startswith("/dev/nvidia") for path in settings.devices)
    assert not any("caps" in path or "modeset" in path for path in settings.devices)
    assert not any("/proc" in path for path in shown(settings))  # a bind of /proc/self would be the fork server's
