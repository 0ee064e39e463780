"""What the source must not do. Every rule is also fed code that breaks it: a check that cannot fail is worth nothing."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tidy.rules import (
    PACKAGES,
    ROOT,
    imported,
    impure,
    mutable_globals,
    sources,
    undocumented,
    unpickles,
)

CORES = ("coordinator/core", "site_agent/core", "edif_mesh/domain")
MAY_UNPICKLE = {
    "site_agent/runner/child.py": "the sandboxed child opens the payload",
    "edif_mesh/results/torchfile.py": "writes the file that the unmodified client loads; reads none",
}


def parse(code: str) -> ast.Module:
    return ast.parse(code)


def test_the_cores_read_no_clock_draw_no_randomness_and_do_no_io() -> None:
    offences = {str(path): found for path, tree in sources(*CORES) if (found := impure(tree))}
    assert offences == {}


@pytest.mark.parametrize(
    "code",
    [
        "import time",
        "from random import random",
        "import os.path",
        "def f():\n    open('x')",
        "def f():\n    import socket",
        "async def f():\n    pass",
        "def f(x):\n    return hash(x)",
    ],
)
def test_the_rule_about_the_cores_sees_an_offence(code: str) -> None:
    assert impure(parse(code))


def test_the_vocabulary_needs_the_standard_library_only() -> None:
    for path, tree in sources("edif_mesh/domain"):
        outside = [n for n in imported(tree) if n.split(".")[0] not in (*sys.stdlib_module_names, "edif_mesh")]
        assert outside == [], path
    for name in ("messages.py", "subjects.py"):
        tree = ast.parse((ROOT / "edif_mesh/wire" / name).read_text())
        assert [n for n in imported(tree) if n.split(".")[0] not in (*sys.stdlib_module_names, "edif_mesh")] == []


def test_bytes_become_code_in_the_sandboxed_child_only() -> None:
    offences = {
        str(path): found
        for path, tree in sources(*PACKAGES)
        if str(path) not in MAY_UNPICKLE and (found := unpickles(tree))
    }
    assert offences == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "RequestModel.deserialize(x)",
    ],
)
def test_the_rule_about_pickles_sees_an_offence(code: str) -> None:
    assert unpickles(parse(code))


def test_typer_is_for_commands_only() -> None:
    allowed = re.compile(r"edif_mesh/cli/|.*/__main__\.py$")
    offences = [
        str(p)
        for p, tree in sources(*PACKAGES)
        if not allowed.match(str(p)) and any(n.split(".")[0] == "typer" for n in imported(tree))
    ]
    assert offences == []


def test_everything_public_in_the_cores_and_on_the_wire_says_what_it_is() -> None:
    offences = {str(p): found for p, tree in sources(*CORES, "edif_mesh/wire") if (found := undocumented(tree))}
    assert offences == {}


def test_the_rule_about_docstrings_sees_an_offence() -> None:
    assert undocumented(parse('"""Here."""\ndef f():\n    pass')) == ["f"]


def test_no_module_holds_mutable_state() -> None:
    offences = {str(p): found for p, tree in sources(*PACKAGES) if (found := mutable_globals(tree))}
    assert offences == {}
    assert mutable_globals(parse("CACHE = {}"))


def test_every_file_has_a_name_that_says_what_it_is() -> None:
    vague = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
    assert [str(p) for p, _ in sources(*PACKAGES, "tests", "benchmarks") if p.name in vague] == []


def test_no_tracked_file_names_a_private_path() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    private = re.compile(r"/(root|home/[a-z]+|work|opt)/[a-z.]")
    offences = []
    for name in listed:
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".toml", ".yml", ".txt", "")
            and path.is_file()
            and name != "tests/tidy/test_source.py"
        ):
            text = path.read_text(errors="replace")
            offences += [
                f"{name}: {m.group(0)}"
                for m in private.finditer(text)
                if "/opt/edif" not in text[m.start() : m.start() + 12]
            ]
    assert offences == []


@pytest.mark.parametrize("command", [["-c", "import edif_mesh"], ["-m", "edif_mesh.cli", "--help"], ["-c", "import coordinator.__main__"],
                                     ["-c", "import site_agent.__main__"], ["-c", "import edif_mesh.client"]])  # fmt: skip
def test_what_starts_often_or_holds_keys_imports_no_torch(command: list[str]) -> None:
    watch = "import atexit, sys; atexit.register(lambda: print('HEAVY', sorted({'torch', 'nnsight', 'transformers'} & set(sys.modules))))"
    code = f"{watch}; import runpy; " + (
        command[1]
        if command[0] == "-c"
        else f"sys.argv = {command[1:]!r}; runpy.run_module({command[1]!r}, run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT
    )
    assert "HEAVY []" in done.stdout, done.stdout[-500:] + done.stderr[-500:]


def test_the_readme_names_only_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets
    commands = set(re.findall(r"^def ([a-z_]+)\(", (ROOT / "edif_mesh/cli/main.py").read_text(), re.MULTILINE))
    used = set(re.findall(r"`edif ([a-z]+)", text)) - {"models"}
    assert used <= commands


def test_every_document_that_is_linked_exists() -> None:
    for page in [
        ROOT / "README.md",
        ROOT / "ARCHITECTURE.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists() or Path(target).is_absolute(), f"{page.name} links {target}"


def test_the_protocol_page_is_what_the_code_says() -> None:
    from edif_mesh.wire.docs import protocol_page

    assert (ROOT / "docs/protocol.md").read_text() == protocol_page(), "type: make docs"
