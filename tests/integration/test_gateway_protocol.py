"""The gateway of a real mesh, spoken to by hand: every line of nnsight's remote protocol that no construct shows."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator

import httpx
import pytest
import torch
import websocket
import zstandard

from tests import traces
from tests.mesh import RunningMesh, running_mesh, until
from tests.models import TINY, tiny_gpt2
from tests.raw_client import HEADERS, RawClient, load, model_key


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    with running_mesh(tmp_path_factory.mktemp("gateway"), tiny_gpt2(), sites=1) as mesh:
        yield mesh


@pytest.fixture
def client(mesh: RunningMesh) -> Iterator[RawClient]:
    client = RawClient(mesh.gateway_url)
    yield client
    client.http.close()


@pytest.fixture(scope="module")
def hidden() -> torch.Tensor:
    """What `traces.one_read` saves, from a local run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.models import cache

    folder = next((cache() / f"models--{tiny_gpt2().replace('/', '--')}" / "snapshots").iterdir())
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    kept: list[torch.Tensor] = []
    model.transformer.h[-1].register_forward_hook(
        lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(**AutoTokenizer.from_pretrained(folder)("Hello world", return_tensors="pt"))
    return kept[0]


# ------------------------------------------------------------------------------------------------- who may speak to it


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8001"},
        {"host": ""},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_no_web_page_may_use_it(client: RawClient, headers: dict[str, str]) -> None:
    answers = [client.http.get("/ping", headers=headers), client.post(b"x", headers=HEADERS | headers)]
    assert [answer.status_code for answer in answers] == [403, 403]
    assert "only programs on this machine" in answers[0].json()["detail"]
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        websocket.create_connection(
            client.url.replace("http", "ws") + "/subscribe",
            header=[f"{k}: {v}" for k, v in headers.items() if k != "host"],
            host=headers.get("host") or ("x" if "host" in headers else None),
            suppress_origin=True,
        )
    assert refused.value.status_code == 403


def test_its_own_pages_may_use_it(client: RawClient) -> None:
    own = {"origin": client.url, "sec-fetch-site": "same-origin"}
    assert client.http.get("/ping", headers=own).json() == "pong"


# ------------------------------------------------------------------------------------------------------------ old clients


def test_an_old_client_is_told_to_upgrade(client: RawClient) -> None:
    old = {
        "nnsight-model-key": "nnsight.modeling.language.LanguageModel:{}",
        "content-type": "application/octet-stream",
    }
    answers = [
        client.http.post("/request", content=b"raw", headers=old),
        client.http.get("/ws/socket.io/?EIO=4&transport=polling"),
        client.post(b"x", headers={}),
        client.post(b"x", headers={"nnsight-version": "0.5.13"}),
    ]
    for answer in answers:
        assert answer.status_code == 400
        assert "nnsight>=0.8" in answer.json()["detail"]
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        websocket.create_connection(client.url.replace("http", "ws") + "/ws/socket.io/?EIO=4&transport=websocket")
    assert refused.value.status_code == 400
    assert b"nnsight>=0.8" in refused.value.resp_body


def test_nothing_redirects(client: RawClient) -> None:
    assert client.http.post("/request/", content=b"").status_code == 404
    assert client.http.get("/status/").status_code == 404


# -------------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("os.system:{}", "This mesh serves transformers models"),
        ("nnsight.modeling.transformers.TransformersModel:{", "not one that nnsight 0.8 makes"),
        ('nnsight.modeling.transformers.TransformersModel:{"repo_id": 5}', "names no model"),
        (model_key("x" * 5000), "too long"),
    ],
)
def test_a_bad_model_key_is_a_sentence(client: RawClient, key: str, sentence: str) -> None:
    answer = client.post(b"x", key=key)
    assert answer.status_code == 400
    assert sentence in answer.json()["detail"]


@pytest.mark.parametrize(
    "path", ["language.LanguageModel", "vlm.VisionLanguageModel", "transformers.TransformersModel"]
)
def test_every_model_class_of_nnsight_is_understood(client: RawClient, path: str) -> None:
    job = client.submit(b"not a trace", key=model_key(kind=f"nnsight.modeling.{path}"))
    assert "not a trace that nnsight can rebuild" in client.poll(job)["description"]


def test_what_is_not_compressed_as_it_says_is_a_sentence(client: RawClient) -> None:
    answer = client.post(b"plain", compress=True)
    assert (answer.status_code, "not a zstd frame" in answer.text) == (400, True)


def test_a_bomb_is_refused_before_it_is_sent(client: RawClient) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    huge = bomb[:4] + b"\xe0" + (1 << 40).to_bytes(8, "little") + bomb[10:]
    answer = client.post(huge, compress=True)
    assert answer.status_code == 413
    assert "1,074 MB are allowed" in answer.json()["detail"]


def test_a_closed_session_is_a_sentence(client: RawClient) -> None:
    session = client.subscribe()
    session.close()
    assert until(lambda: client.post(b"x", session=session.id).status_code == 409, 5)
    assert "Run the trace again" in client.post(b"x", session=session.id).json()["detail"]


def test_a_model_that_nobody_offers_ends_the_job_with_a_sentence(client: RawClient) -> None:
    last = client.subscribe().run(b"x", key=model_key("nobody/has-this"))[-1]
    assert last["status"] == "ERROR"
    assert "nobody/has-this" in last["description"]
    assert TINY in last["description"]
    polled = client.poll(client.submit(b"x", key=model_key("nobody/has-this")))
    assert polled["description"] == last["description"]


def test_a_bad_job_id_is_not_polled_for_ever(client: RawClient) -> None:
    assert client.http.get("/response/nonsense").status_code == 400
    unknown = client.http.get("/response/j" + "0" * 23)
    assert unknown.json()["status"] == "ERROR"
    assert "There is no job" in unknown.json()["description"]


# --------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("compress", [False, True])
def test_a_blocking_client_gets_lines_and_then_the_result_inline(client: RawClient, compress: bool) -> None:
    payload = traces.printing()
    if compress:
        payload = zstandard.ZstdCompressor(level=6).compress(payload)
    frames = client.subscribe().run(payload, compress=compress)
    assert [f["description"] for f in frames if f["status"] == "LOG"] == ["one", "two", "three"]
    last = frames[-1]
    assert load(last["data"], compress=compress)["logits"]["logits"].shape[-1] == 512
    assert last["meta"]["site"] == "ansbach"
    assert last["meta"]["attempt"] == 1
    assert last["meta"]["memory_bytes"] > 0
    assert last["meta"]["runtime_s"] >= 0
    assert any("ansbach" in f["description"] for f in frames if f["status"] in ("DISPATCHED", "RUNNING"))


@pytest.mark.parametrize("compress", [False, True])
def test_a_polling_client_gets_a_url(client: RawClient, hidden: torch.Tensor, compress: bool) -> None:
    payload = traces.one_read()
    if compress:
        payload = zstandard.ZstdCompressor(level=6).compress(payload)
    found = client.poll(client.submit(payload, compress=compress))
    head, got = client.http.head(found["data"]), client.http.get(found["data"])
    assert head.status_code == got.status_code == 200
    assert int(head.headers["content-length"]) == len(got.content)
    assert "content-encoding" not in got.headers
    values = load(got.content, compress=compress)
    assert torch.equal(_tensor(values["hidden"]), hidden)


def test_a_large_result_is_a_download_that_can_be_resumed(client: RawClient) -> None:
    last = client.subscribe().run(traces.large(8))[-1]
    whole = client.http.get(last["data"]).content
    part = client.http.get(last["data"], headers={"range": f"bytes={len(whole) // 2}-"})
    assert part.status_code == 206
    assert part.content == whole[len(whole) // 2 :]
    assert torch.equal(load(whole)["big"], torch.ones(8 << 18))


def test_a_result_is_behind_its_token(client: RawClient) -> None:
    url = str(client.poll(client.submit(traces.one_read()))["data"])
    for guess in (url.rpartition("/")[0] + "/" + "A" * 22, url.rpartition("/")[0] + "/..%2f..%2fclient.toml"):
        assert client.http.get(guess).status_code == 404


def test_an_error_of_the_traced_code_keeps_its_traceback(client: RawClient) -> None:
    last = client.subscribe().run(traces.failing())[-1]
    assert last["status"] == "ERROR"
    assert "ZeroDivisionError" in last["description"]
    assert "1 / 0" in last["description"]
    assert last["meta"]["site"] == "ansbach"


def test_a_client_that_leaves_finds_its_result_later(client: RawClient, hidden: torch.Tensor) -> None:
    session = client.subscribe()
    job = client.post(traces.one_read(), session=session.id).json()["id"]
    session.close()
    found = client.poll(job)
    assert torch.equal(_tensor(load(client.http.get(found["data"]).content)["hidden"]), hidden)


def test_several_jobs_of_one_session_do_not_mix(client: RawClient) -> None:
    sessions = [client.subscribe() for _ in range(4)]
    results: dict[int, list[dict[str, object]]] = {}

    def run(number: int) -> None:
        results[number] = sessions[number].run(traces.printing() if number % 2 else traces.one_read())

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, frames in results.items():
        assert {frame["id"] for frame in frames} == {frames[0]["id"]}
        assert sum(frame["status"] == "LOG" for frame in frames) == (3 if number % 2 else 0)
    assert len({frames[0]["id"] for frames in results.values()}) == 4


def test_an_upload_of_100_mb_arrives(client: RawClient) -> None:
    last = client.subscribe().run(os.urandom(100 << 20))[-1]
    assert "not a trace that nnsight can rebuild" in last["description"]


# ------------------------------------------------------------------------------------------------------------- questions


def test_what_nnsight_asks_of_the_service(client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    import nnsight
    from huggingface_hub import HfApi
    from nnsight.schema.config import CONFIG

    monkeypatch.setattr(CONFIG.API, "HOST", client.url)
    status = nnsight.status()
    assert status.status.value == "UP"
    assert status[TINY]["state"] == "RUNNING"
    assert TINY in str(status)
    monkeypatch.setattr(HfApi, "model_info", lambda self, repo_id: type("Info", (), {"id": repo_id}))
    assert nnsight.is_model_running(TINY)
    assert not nnsight.is_model_running("nobody/has-this")
    assert nnsight.compare().python_matches
    assert not nnsight.compare().critical_mismatches
    assert client.http.get("/whoami").json()["email"]
    assert client.http.get("/ping").json() == "pong"
    assert client.http.get("/connected").json() == {"status": "connected"}
    assert client.http.head("/connected").status_code == 200


# ---------------------------------------------------------------------------------------------------- what dies meanwhile


def test_a_job_outlives_the_gateway(mesh: RunningMesh, client: RawClient, hidden: torch.Tensor) -> None:
    job = client.submit(traces.one_read())
    before = mesh.processes()["gateway"]
    mesh.kill("gateway")
    assert until(lambda: mesh.processes().get("gateway") not in (None, before), 30)
    found = client.poll(job)
    # Without compression, as the order said: the new gateway knows it from the order, not from memory.
    assert torch.equal(_tensor(load(client.http.get(found["data"]).content)["hidden"]), hidden)


def test_a_job_sent_while_the_broker_is_away_runs_when_it_is_back(
    mesh: RunningMesh, client: RawClient, hidden: torch.Tensor
) -> None:
    assert until(lambda: _answers(client), 30)
    session = client.subscribe()
    mesh.kill("nats")
    frames = session.run(traces.one_read())
    assert torch.equal(_tensor(load(frames[-1]["data"])["hidden"]), hidden)
    assert not list((mesh.home / "outbox").glob("*.payload"))


def _answers(client: RawClient) -> bool:
    try:
        return client.http.get("/connected").status_code == 200
    except httpx.TransportError:
        return False


def _tensor(value: object) -> torch.Tensor:
    found = value[0] if isinstance(value, tuple) else value
    assert isinstance(found, torch.Tensor), json.dumps(str(type(value)))
    return found


def test_a_researcher_who_waits_for_a_model_sees_how_far_it_is(mesh: RunningMesh, client: RawClient) -> None:
    session, payload = client.subscribe(), traces.one_read()
    for host in mesh.hosts("ansbach"):
        host.kill()
    frames = session.run(payload)
    session.close()
    assert frames[-1]["status"] == "COMPLETED", frames[-1]
    waiting = [frame["description"] for frame in frames if frame["status"] == "DEPLOYING"]
    told = [text for text in waiting if text.startswith("Loading the model at ansbach")]
    assert any("loading weights, 0 % of 0.7 MB" in text for text in told), waiting
