"""The self-test of each profile, really run: it passes where the profile holds, and any one layer that is missing fails it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edif_mesh.config import SiteConfig
from edif_mesh.domain.ids import FederationId, SiteId
from edif_mesh.domain.site import SandboxProfile, confines
from site_agent.runner import selftest
from site_agent.runner.selftest import Choice, choose, deviation, try_profile
from tests.ordinary_user import run_as_ordinary_user
from tests.runtimes import BUBBLEWRAP

BASE, NAMESPACED, STRICT = SandboxProfile
NO_NAMESPACES = subprocess.run(["unshare", "-Upf", "true"], capture_output=True).returncode != 0
needs_namespaces = pytest.mark.skipif(NO_NAMESPACES, reason="this kernel allows no namespaces here")
needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None or NO_NAMESPACES, reason="bubblewrap is not installed here, or may not run"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def a_site(**fields: Any) -> SiteConfig:
    there = Path("x")
    return SiteConfig(FederationId("f"), SiteId("s"), there, there, there, (), **fields)


def test_a_profile_holds_what_the_weaker_ones_hold() -> None:
    assert [least for least in SandboxProfile if NAMESPACED.holds(least)] == [BASE, NAMESPACED]
    assert BASE.holds("")
    assert not STRICT.holds("stricter")
    assert confines("strict", "namespaced")
    assert not confines("base", "namespaced")
    assert not confines("", "")
    assert not confines("paranoid", "base")


def test_base_holds_on_this_machine() -> None:
    assert try_profile(BASE) == ""


@needs_namespaces
def test_namespaced_holds_on_this_machine() -> None:
    assert try_profile(NAMESPACED) == ""


@needs_bubblewrap
def test_strict_holds_in_bubblewrap() -> None:
    assert try_profile(STRICT, BUBBLEWRAP) == ""


TRY_ALL = """
from edif_mesh.domain.site import SandboxProfile
from site_agent.runner.selftest import try_profile
from tests.runtimes import BUBBLEWRAP
for profile in SandboxProfile:
    print(profile, try_profile(profile, BUBBLEWRAP) or "holds")
"""


@needs_root
@needs_namespaces
def test_the_profiles_hold_for_an_ordinary_user_too() -> None:
    done = run_as_ordinary_user(["-c", TRY_ALL])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["base holds", "namespaced holds"]
    if shutil.which("bwrap"):
        assert lines[2] == "strict holds"


# What is broken, in which profile, and what the self-test then finds a confined process to be able to do.
SABOTAGE = {
    "no system call filter": (BASE, "confine.install_filter = lambda **_: None", "a socket of AF_UNIX"),
    "a filter that lets fork through": (
        BASE,
        "seccomp._NAMES = [*seccomp._NAMES, 'clone']",
        "fork",
    ),
    "no Landlock": (BASE, "probes.restrict_files = confine.restrict_files = lambda *_: None", "read a file of the agent"),
    "Landlock that allows a folder too many": (
        BASE,
        "import tempfile; old = confine.restrict_files; probes.restrict_files = lambda f, *_: old((*f, tempfile.gettempdir()))",
        "read a file of the agent",
    ),
    "capabilities kept": (BASE, "confine._keep_capabilities = lambda kept: None; confine._drop_bounding_set = lambda: None", ""),
    "descriptors kept": (BASE, "confine._close_descriptors = lambda keep: None", "hold descriptor"),
    "no network namespace": (NAMESPACED, "namespaces._NEWNET = 0", "namespaces are still the agent's own"),
    "no IPC namespace": (NAMESPACED, "namespaces._NEWIPC = 0", "ipc namespaces are still the agent's own"),
    "no pid namespaces": (
        NAMESPACED,
        "namespaces.Enclosure.fork = lambda self: (os.fork(), 1); namespaces.Enclosure.enter = lambda self: None; confine.leave_users = lambda: None",
        "namespaces are still the agent's own",
    ),
    "the machine's files": (NAMESPACED, "namespaces.show_only = lambda *_: None", "see the machine in /sys"),
    "a tree that can be written": (
        NAMESPACED,
        "namespaces._ATTR_RDONLY = 0; namespaces._MS_NODEV = 0; confine.leave_users = lambda: None; confine._take_own_uid = lambda *a, **k: None",
        "write to the root folder",
    ),
    "a crash": (BASE, "probes._sealed = lambda *a: os.abort()", ""),
    "silence": (BASE, "import time; probes._files = lambda *a: time.sleep(100)", "did not end within"),
    "a part left out": (BASE, "probes._files = lambda *a: None", "did not try what it should"),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGE)
def test_any_layer_that_is_missing_fails_the_self_test(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, sabotage, finding = SABOTAGE[name]
    if profile is NAMESPACED and NO_NAMESPACES:
        pytest.skip("this kernel allows no namespaces here")
    if "capabilities" in name and os.geteuid() != 0:
        pytest.skip("an ordinary user has none to keep")
    (tmp_path / "sabotaged_probes.py").write_text(
        f"import os\nfrom site_agent.runner import confine, namespaces, probes, seccomp\n{sabotage}\nprobes.main()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    found = try_profile(profile, probes="sabotaged_probes", patience_s=3 if name == "silence" else 30)
    assert found
    assert finding in found, found


@needs_bubblewrap
@pytest.mark.parametrize(
    ("runtime", "finding"),
    [
        (("env",), "namespaces are still the agent's own"),
        (("bwrap", "--dev-bind", "/", "/", "--unshare-all", "--share-net", "--"), "the net"),
        (("bwrap", "--bind", "/", "/", "--dev", "/dev", "--unshare-all", "--"), "read a file of the agent"),
        (("false",), "ended early"),
        (("no-such-runtime",), "No such file"),
        ((), "no sandbox_command"),
    ],
)
def test_a_runtime_that_does_not_hold_is_not_strict(runtime: tuple[str, ...], finding: str) -> None:
    assert finding in try_profile(STRICT, runtime)


# ------------------------------------------------------------------------------------------------------------- choice


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch) -> set[SandboxProfile]:
    """The profiles that pass; the self-test itself is shown above."""
    holding: set[SandboxProfile] = set()
    monkeypatch.setattr(selftest, "try_profile", lambda profile, runtime: "" if profile in holding else "it is broken.")
    return holding


@pytest.mark.parametrize(
    ("holds", "fields", "chosen"),
    [
        ({BASE, NAMESPACED, STRICT}, {}, STRICT),
        ({BASE, NAMESPACED}, {}, NAMESPACED),
        ({BASE}, {}, BASE),
        ({BASE}, {"least_sandbox": "namespaced"}, None),
        ({BASE, NAMESPACED}, {"least_sandbox": "namespaced"}, NAMESPACED),
        ({BASE, NAMESPACED}, {"sandbox": "base"}, BASE),
        ({BASE}, {"sandbox": "namespaced"}, None),
        ({BASE, NAMESPACED}, {"sandbox": "base", "least_sandbox": "namespaced"}, None),
        (set(), {}, None),
    ],
)
@pytest.mark.parametrize("try_all", [False, True])
def test_the_strongest_that_holds_is_chosen_and_never_one_below_the_least(
    holding: set[SandboxProfile], holds: set[SandboxProfile], fields: dict[str, str], chosen: SandboxProfile | None, try_all: bool
) -> None:  # fmt: skip
    holding |= holds
    choice = choose(a_site(**fields), try_all=try_all)
    assert choice.profile == chosen
    if chosen is None:
        assert "runs nothing" in choice.sentence()


def test_the_sentence_says_what_each_profile_lacks() -> None:
    text = Choice(None, {NAMESPACED: "no.", BASE: "neither."}, BASE).sentence()
    assert text.endswith("so this site runs nothing. namespaced: no. base: neither.")


def test_a_process_that_is_not_confined_is_seen_from_outside() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert "any system call" in deviation(process.pid, BASE)
        assert "does not say" in deviation(2**22 + 1, BASE)
    finally:
        process.kill()
        process.wait()
