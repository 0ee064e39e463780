"""What the agent says of its machine, without torch."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from site_agent import hardware

ROOT = Path(__file__).resolve().parent.parent.parent


def test_there_is_always_a_device_with_memory() -> None:
    found = hardware.devices()
    assert found
    assert all(device.kind in {"cpu", "cuda"} and 0 < device.free_bytes <= device.memory_bytes for device in found)
    assert 0 < hardware.free_memory_bytes() <= hardware.cpu().memory_bytes


def test_versions_are_those_of_the_installed_packages() -> None:
    found = hardware.versions()
    assert found.nnsight == version("nnsight")
    assert found.python == platform.python_version()
    assert found.torch
    assert "+" not in found.torch


def test_the_agent_process_imports_no_torch() -> None:
    code = (
        "import sys, site_agent.__main__, site_agent.hardware as h; h.versions(); h.devices();"
        "print([name for name in ('torch', 'nnsight', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
