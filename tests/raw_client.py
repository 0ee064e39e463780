"""The remote protocol of nnsight 0.8, spoken by hand: what the unmodified client sends, and what it would choke on."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import httpx
import torch
import websocket
import zstandard

from tests.models import TINY

HEADERS = {"nnsight-version": "0.8.1", "python-version": "3.11.7 (main)", "ndif-timestamp": "1.0"}
STATUSES = {
    *("RECEIVED", "QUEUED", "PROVISIONING", "DEPLOYING", "DISPATCHED"),
    *("RUNNING", "COMPLETED", "ERROR", "LOG"),
}


def model_key(repo_id: str = TINY, kind: str = "nnsight.modeling.transformers.TransformersModel") -> str:
    return f"{kind}:" + json.dumps({"repo_id": repo_id, "revision": None, "task": "text-generation"})


class RawClient:
    """One client of a gateway at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=60)

    def post(
        self,
        payload: bytes,
        *,
        key: str | None = None,
        session: str = "",
        compress: bool = False,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        data = {"model_key": key or model_key(), "session_id": session, "compress": compress, "env": {}}
        files = {"blob": ("request", payload, "application/octet-stream")}
        sent = HEADERS if headers is None else headers
        return self.http.post("/request", data={"data": json.dumps(data)}, files=files, headers=sent)

    def submit(self, payload: bytes, **options: Any) -> str:
        """Submit without a session and return the job id."""
        answer = self.post(payload, **options)
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "RECEIVED"
        return str(answer.json()["id"])

    def poll(self, job: str, within_s: float = 60) -> dict[str, Any]:
        """Poll until the end, as a non-blocking client does; anything but 404 and 200 fails."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            try:
                answer = self.http.get(f"/response/{job}")
            except httpx.TransportError:  # the gateway itself is being started again
                time.sleep(0.2)
                continue
            assert answer.status_code in (200, 404), answer.text
            if answer.status_code == 200:
                found: dict[str, Any] = answer.json()
                assert found["status"] in STATUSES
                if found["status"] in ("COMPLETED", "ERROR"):
                    return found
            time.sleep(0.05)
        raise AssertionError(f"{job} did not end within {within_s} s")

    def subscribe(self) -> RawSession:
        return RawSession(self)


class RawSession:
    """A subscription, as a blocking client holds one."""

    def __init__(self, client: RawClient) -> None:
        self.client = client
        self.socket = websocket.create_connection(client.url.replace("http", "ws") + "/subscribe", timeout=60)
        self.id = json.loads(self.socket.recv())["session_id"]

    def run(self, payload: bytes, **options: Any) -> list[dict[str, Any]]:
        """Post a job and return all frames to the last."""
        answer = self.client.post(payload, session=self.id, **options)
        assert answer.status_code == 200, answer.text
        return self.frames()

    def frames(self) -> list[dict[str, Any]]:
        frames = []
        while not frames or frames[-1]["status"] not in ("COMPLETED", "ERROR"):
            message = self.socket.recv()
            assert message, "the gateway closed before a last frame"
            if isinstance(message, bytes):
                frames.append(torch.load(io.BytesIO(message), weights_only=False))
            else:
                frames.append(json.loads(message))
            assert frames[-1]["status"] in STATUSES
        return frames

    def close(self) -> None:
        self.socket.close()


def load(blob: bytes, *, compress: bool = False) -> dict[str, Any]:
    """Load a result as the client does: one zstd frame that declares its size, then torch.load."""
    data = zstandard.ZstdDecompressor().decompress(blob) if compress else blob
    values: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    return values
