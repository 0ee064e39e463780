"""Unmodified nnsight 0.8 through the mesh: every construct gives what it gives locally, on three architectures."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import httpx
import nnsight
from nnsight import CONFIG, TransformersModel
from nnsight.intervention.backends.remote import AsyncRemoteBackend, RemoteBackend, RemoteError
from nnsight.modeling import huggingface

from edif_mesh.client import BlockingMesh
from edif_mesh.models import DEMO_MODEL, fetch_demo
from tests.contract.comparing import same
from tests.contract.constructs import CONSTRUCTS, ESSENTIALS, THEMES
from tests.contract.constructs.construct import PROMPT, Construct, told
from tests.contract.constructs.page import PAGE, WORKS, refused, row, same_error
from tests.mesh import ROOT, RunningMesh, environment, running_mesh
from tests.models import ADAPTER, cache, gpt2_shape, lora_adapter, snapshot, tiny_gpt2

MODELS = ("tiny", "gpt2", "smollm2")
OTHERS = tuple(c for c in CONSTRUCTS if c not in ESSENTIALS)
OF_THE_TINY_MODEL = {"peft_adapter", "peft_later"}
IN_PROCESS = ("Changing values", "Values that come back", "Gradients and training", "Edits and caches")


@pytest.fixture(scope="module")
def ids() -> dict[str, str]:
    offline = os.environ.pop("HF_HUB_OFFLINE", None)
    fetch_demo(cache())
    lora_adapter()
    os.environ["HF_HUB_OFFLINE"] = offline or "1"
    return {"tiny": tiny_gpt2(), "gpt2": gpt2_shape(), "smollm2": DEMO_MODEL}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, ids: dict[str, str]) -> Iterator[RunningMesh]:
    with running_mesh(tmp_path_factory.mktemp("mesh"), *ids.values(), sites=1) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def models(ids: dict[str, str]) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            repo_id = ids[name]
            huggingface._ID_CACHE[repo_id] = repo_id
            folder = next((cache() / f"models--{repo_id.replace('/', '--')}" / "snapshots").iterdir())
            # By its folder, since the process may have looked at another cache before; by its id for the mesh.
            loaded[name] = TransformersModel(str(folder), task="text-generation", dispatch=True)
            loaded[name].repo_id = repo_id
        return loaded[name]

    return load


@pytest.fixture(autouse=True)
def client_settings(mesh: RunningMesh) -> Iterator[None]:
    before = CONFIG.API.HOST, CONFIG.APP.REMOTE_LOGGING, CONFIG.API.COMPRESS
    CONFIG.API.HOST, CONFIG.APP.REMOTE_LOGGING = mesh.gateway_url, False
    torch.set_num_threads(1)
    yield
    CONFIG.API.HOST, CONFIG.APP.REMOTE_LOGGING, CONFIG.API.COMPRESS = before


@pytest.fixture(scope="module")
def page() -> list[str]:
    return (ROOT / PAGE).read_text().splitlines()


def outcome(construct: Construct, model: Any) -> str:
    """Run a construct here and there, and say in the words of the page what came of it."""
    expected = construct.run(model, False)
    assert expected
    try:
        got = construct.run(model, True)
    except Exception as error:
        return refused(told(error, model))
    assert list(got) == list(expected)
    different = [name for name in expected if not same(expected[name], got[name])]
    if different and construct.differs is not None:
        return f"differs: {construct.differs}"
    if different:
        return f"not the same: {different}"
    return same_error(expected["said"]) if construct.says is not None else WORKS


@pytest.mark.parametrize("construct", CONSTRUCTS, ids=lambda construct: construct.id)
def test_a_construct_does_what_its_row_says(
    construct: Construct, models: Callable[[str], Any], page: list[str]
) -> None:
    assert row(construct, outcome(construct, models("tiny"))) in page


@pytest.mark.parametrize("model", ["gpt2", "smollm2"])
@pytest.mark.parametrize("construct", ESSENTIALS, ids=lambda construct: construct.id)
def test_the_essentials_do_so_on_other_models(
    construct: Construct, model: str, models: Callable[[str], Any], page: list[str]
) -> None:
    assert row(construct, outcome(construct, models(model))) in page


@pytest.mark.slow
@pytest.mark.parametrize("construct", OTHERS, ids=lambda construct: construct.id)
def test_all_others_do_so_on_a_larger_model(
    construct: Construct, models: Callable[[str], Any], page: list[str]
) -> None:
    if construct.id in OF_THE_TINY_MODEL:
        pytest.skip("the adapter is the tiny model's")
    assert row(construct, outcome(construct, models("gpt2"))) in page


def test_without_compression_too(models: Callable[[str], Any]) -> None:
    CONFIG.API.COMPRESS = not CONFIG.API.COMPRESS
    model = models("tiny")
    for construct in ESSENTIALS[:4]:
        assert same(construct.run(model, False), construct.run(model, True))


def test_polling_without_waiting(models: Callable[[str], Any]) -> None:
    model = models("tiny")
    with model.trace(PROMPT, remote=True, blocking=False) as tracer:
        logits = model.lm_head.output.save()
    backend = tracer.backend
    assert backend.job_id is not None
    result = None
    for _ in range(600):
        if (result := backend.poll()) is not None:
            break
    assert result is not None
    with model.trace(PROMPT):
        expected = model.lm_head.output.save()
    assert torch.equal(result["logits"], expected)


def test_awaited(models: Callable[[str], Any]) -> None:
    model = models("tiny")
    backend = AsyncRemoteBackend(model.to_model_key())
    with model.trace(PROMPT, backend=backend):
        logits = model.lm_head.output.save()

    async def wait() -> Any:
        return await asyncio.wait_for(_resolve(backend), 60)

    result = asyncio.run(wait())
    with model.trace(PROMPT):
        expected = model.lm_head.output.save()
    assert torch.equal(result["logits"], expected)


async def _resolve(backend: Any) -> Any:
    return await backend


def test_prints_arrive_and_the_cost_is_told(models: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = models("tiny"), []
    original = RemoteBackend.note

    def note(self: Any, response: Any) -> bool:
        seen.append((response.status.value, response.description))
        return original(self, response)

    monkeypatch.setattr(RemoteBackend, "note", note)
    with model.trace(PROMPT, remote=True) as tracer:
        print("from inside", model.lm_head.output.shape)
        logits = model.lm_head.output.save()
    texts = [text for status, text in seen if status == "LOG"]
    assert any("from inside torch.Size" in text for text in texts), seen
    assert any(status == "DISPATCHED" or status == "RUNNING" for status, _ in seen)
    meta = tracer.backend.meta
    assert meta["site"] == "ansbach"
    assert meta["attempt"] == 1
    assert meta["runtime_s"] > 0
    assert meta["memory_bytes"] >= 0


def test_an_error_of_the_researcher_s_own_comes_back_with_file_and_line(models: Callable[[str], Any]) -> None:
    model = models("tiny")
    with pytest.raises(RemoteError) as raised, model.trace(PROMPT, remote=True):
        hidden = model.lm_head.output
        broken = hidden @ torch.zeros(3, 3)
    text = str(raised.value)
    assert "RuntimeError" in text
    assert f'File "{__file__}"' in text
    assert "broken = hidden @ torch.zeros(3, 3)" in text
    assert "site_agent" not in text


def test_a_save_that_cannot_be_sent_is_refused_at_its_line(models: Callable[[str], Any]) -> None:
    model = models("tiny")
    with pytest.raises(RemoteError) as raised, model.trace(PROMPT, remote=True):
        hidden = model.lm_head.output
        found = {"steps": [hidden, (row for row in hidden)]}.save()
        hidden @ torch.zeros(3, 3)
    text = str(raised.value)
    assert "'found['steps'][1]' is a generator" in text
    assert "Save list(...) of it instead." in text
    assert f'File "{__file__}"' in text
    assert "found = {'steps': [hidden, (row for row in hidden)]}.save()" in text
    assert "RuntimeError" not in text, "the line after the save has run"


def test_values_that_are_no_tensors_come_back_as_they_were(models: Callable[[str], Any]) -> None:
    import datetime
    from collections import Counter, deque

    model = models("tiny")
    with model.trace(PROMPT, remote=True):
        hidden = model.lm_head.output.detach()
        sparse = hidden[0].to_sparse_csr().save()
        half = hidden.to(torch.float8_e4m3fn).save()
        counts = Counter(hidden.argmax(-1).flatten().tolist()).save()
        last = deque([hidden.mean().item(), hidden.std().item()], maxlen=2).save()
        day = datetime.date(2024, 2, 29).save()
        ids = model.tokenizer(PROMPT).save()
    with model.trace(PROMPT):
        expected = model.lm_head.output.detach().save()
    assert sparse.layout is torch.sparse_csr
    assert torch.equal(sparse.to_dense(), expected[0])
    assert torch.equal(half.view(torch.uint8), expected.to(torch.float8_e4m3fn).view(torch.uint8))
    assert (type(counts), sum(counts.values())) == (Counter, expected.shape[1])
    assert (type(last), last.maxlen, list(last)) == (deque, 2, [expected.mean().item(), expected.std().item()])
    assert day == datetime.date(2024, 2, 29)
    assert ids.word_ids() == model.tokenizer(PROMPT).word_ids()


def test_several_clients_at_once(models: Callable[[str], Any], mesh: RunningMesh, tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(
        "import sys, torch\nfrom nnsight import TransformersModel\nfrom nnsight.modeling import huggingface\n"
        "huggingface._ID_CACHE[sys.argv[1]] = sys.argv[1]\n"
        "model = TransformersModel(sys.argv[1], task='text-generation', dispatch=True)\n"
        "for _ in range(5):\n"
        "    with model.trace(sys.argv[2], remote=True):\n"
        "        logits = model.lm_head.output.save()\n"
        "    with model.trace(sys.argv[2]):\n"
        "        expected = model.lm_head.output.save()\n"
        "    assert torch.equal(logits, expected)\n"
    )

    def client(prompt: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), tiny_gpt2(), prompt]
        settings = environment(NDIF_HOST=mesh.gateway_url)
        return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)

    with ThreadPoolExecutor(3) as pool:
        for done in pool.map(client, ("hello", "hello world", "The Eiffel Tower")):
            assert done.returncode == 0, done.stderr[-800:]


def test_the_small_questions_are_answered(
    mesh: RunningMesh, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = nnsight.ndif_status()
    assert set(ids.values()) <= set(status.keys())
    assert all(status[name]["state"] == "RUNNING" for name in ids.values())

    class Hub:
        def model_info(self, repo_id: str) -> Any:
            return type("Info", (), {"id": repo_id})()

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert nnsight.is_model_running(ids["gpt2"])
    assert nnsight.is_model_running(ids["gpt2"], task="text-generation")
    assert not nnsight.is_model_running(ids["gpt2"], task="fill-mask")
    assert not nnsight.is_model_running("nobody/nothing")
    with httpx.Client(base_url=mesh.gateway_url) as http:
        assert http.get("/ping").json() == "pong"
        assert http.get("/connected").json() == {"status": "connected"}
        assert "@" in http.get("/whoami").json()["email"]
        assert http.get("/env").json()["packages"]["nnsight"] == "0.8.1"


def test_a_peft_adapter_of_the_request(models: Callable[[str], Any]) -> None:
    adapter = lora_adapter()
    model = TransformersModel(str(snapshot(tiny_gpt2())), task="text-generation", dispatch=True, peft=str(adapter))
    model.repo_id, model.peft = tiny_gpt2(), ADAPTER
    huggingface._ID_CACHE[model.repo_id] = model.repo_id
    with model.trace(PROMPT):
        expected = model.lm_head.output.save()
    with model.trace(PROMPT, remote=True):
        got = model.lm_head.output.save()
    assert torch.equal(got, expected)
    plain = models("tiny")
    with plain.trace(PROMPT, remote=True):
        without = plain.lm_head.output.save()
    assert not torch.equal(without, expected), "the adapter changes nothing: the test would not notice its absence"


@pytest.fixture(scope="module")
def client(mesh: RunningMesh) -> Iterator[BlockingMesh]:
    with mesh.client() as client:
        yield client


@pytest.mark.parametrize(
    "construct", [*ESSENTIALS, *(c for theme in IN_PROCESS for c in THEMES[theme])], ids=lambda construct: construct.id
)
def test_the_python_client_does_the_same_without_a_gateway(
    construct: Construct,
    models: Callable[[str], Any],
    client: BlockingMesh,
    page: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TransformersModel, "_remote_backend", lambda model, *_: client.backend(model))
    assert row(construct, outcome(construct, models("tiny"))) in page
