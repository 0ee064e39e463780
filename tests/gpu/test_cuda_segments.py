"""The CUDA adapters themselves, on a real device, each side in a process of its own: nothing here may start CUDA and then fork."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.device import needs_gpu

pytestmark = [*needs_gpu, pytest.mark.timeout(120)]
ROOT = Path(__file__).resolve().parents[2]

TWO_PROCESSES = """
import json, os, socket, sys
import torch
from dataclasses import asdict
from site_agent.hosting.cuda_segments import CudaIpc, CudaVmm
from site_agent.hosting.manifest import Segment
from site_agent.hosting.segments import Handle, words_of
kind = {"vmm": CudaVmm, "ipc": CudaIpc}[sys.argv[1]]
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
if os.fork() == 0:
    raw, descriptors, _, _ = socket.recv_fds(theirs, 65536, 1)
    mapped = kind().attach(Handle(**json.loads(raw)), descriptors[0] if descriptors else -1)
    words = words_of(mapped)
    out = {"sum": int(words.long().sum()), "device": str(words.device), "pointer": words.data_ptr() == mapped.pointer}
    low = torch.empty(0, dtype=torch.bfloat16, device=words.device).set_(words.untyped_storage(), 0, (4, 2), (1, 4))
    out["view"] = list(low.shape)
    try:
        words.fill_(1); torch.cuda.synchronize(); out["write"] = "done"
    except RuntimeError as error:
        out["write"] = str(error).splitlines()[0]
    theirs.sendall(json.dumps(out).encode()); os._exit(0)
store = kind()
made = store.create(Segment("cuda:0", 3 << 20))
words_of(made)[:1000] = 5
[(handle, descriptor)] = store.publish()
socket.send_fds(ours, [json.dumps(asdict(handle)).encode()], [descriptor] if descriptor >= 0 else [])
answer = json.loads(ours.recv(65536))
mine = words_of(store.attach(handle, descriptor))
answer["after"] = int(mine.long().sum())
print(json.dumps(answer))
"""


def played_by(kind: str) -> dict[str, object]:
    import json

    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES, kind], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_by_virtual_memory_another_process_reads_and_cannot_write() -> None:
    answer = played_by("vmm")
    assert (answer["sum"], answer["device"], answer["pointer"], answer["view"]) == (5000, "cuda:0", True, [4, 2])
    assert "CUDA error" in str(answer["write"])
    assert answer["after"] == 5000


def test_by_ipc_another_process_reads_and_what_it_writes_is_seen() -> None:
    answer = played_by("ipc")
    assert (answer["sum"], answer["device"], answer["view"]) == (5000, "cuda:0", [4, 2])
    assert answer["write"] == "done"
    assert answer["after"] != 5000


def test_the_driver_says_itself_whether_virtual_memory_works() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from site_agent.hosting.cuda_segments import CudaVmm; print(repr(CudaVmm.problem(['cuda:0'])))"],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.strip() == "''", done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("megabytes", [1, 64, 512])
def test_a_single_changed_bit_is_noticed_on_the_device(megabytes: int) -> None:
    source = f"""
import torch
from site_agent.hosting.checksum import WeightsChecksum
words = torch.randint(-9, 9, ({megabytes} << 18,), dtype=torch.int32, device="cuda:0")
check = WeightsChecksum()
before = [check.of(words)]
assert check.first_difference(before, [check.of(words)]) is None
words[-1] ^= 1
assert check.first_difference(before, [check.of(words)]) is not None
words[-1] ^= 1
assert check.of(words) == WeightsChecksum.of(check, words.cpu()), "the CPU computes the same"
print("noticed")
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "noticed", done.stderr[-2000:]
