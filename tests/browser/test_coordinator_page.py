"""The live page in a real browser: it shows what the mesh does, and a job's name stays text."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.integration.coordinator_rig import Researcher, Rig, Site, eventually

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
]
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--remote-debugging-port=0")


class Page:
    """One page of a headless browser, over the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._asked = socket, 0

    async def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        self._asked += 1
        question = {"id": self._asked, "method": "Runtime.evaluate", "params": {"expression": script}}
        await self._socket.send(json.dumps(question))
        while True:
            answer = json.loads(await asyncio.wait_for(self._socket.recv(), 10))
            if answer.get("id") == self._asked:
                return answer.get("result", {}).get("result", {}).get("value")  # none while the page is being loaded

    async def html(self) -> str:
        return str(await self.run("document.documentElement.outerHTML"))

    async def until(self, text: str) -> str:
        """Return the page's markup once it holds `text`."""

        async def shown() -> str | None:
            html = await self.html()
            return html if text in html else None

        html: str = await eventually(shown, f"the page shows {text}", 30)
        return html


@contextlib.asynccontextmanager
async def opened(url: str, profile: Path) -> AsyncIterator[Page]:
    process = await asyncio.create_subprocess_exec(
        str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        address = ""
        while not address:
            line = (await asyncio.wait_for(process.stderr.readline(), 30)).decode()
            address = line.partition("DevTools listening on ws://")[2].partition("/")[0]
        async with httpx.AsyncClient() as http:
            target = (await http.put(f"http://{address}/json/new?{url}")).json()
        async with connect(target["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Page(socket)
    finally:
        process.kill()
        await process.wait()


async def test_the_page_shows_sites_and_jobs_and_runs_no_markup_of_theirs(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "rig")
    rig.nats.start()
    try:
        await rig.start()
        connection = await rig.connect("test")
        site, ada = Site(rig, connection, "ansbach"), Researcher(rig, connection)
        await site.open()
        await site.advertise(note="<img src=x onerror=\"document.title='broken in'\">")
        order = await ada.submit(name="<script>document.title='broken in'</script>")
        await ada.until(order.job, "PLACED")
        async with opened(rig.url, tmp_path / "profile") as page:
            html = await page.until(">live<")
            assert "&lt;script&gt;document.title" in html
            assert "&lt;img src=x" in html
            assert ">ansbach<" in html
            await page.run("document.querySelector('button.row').click()")
            details = await page.until(">fits<")
            assert order.job in details
            assert "broken in" not in await page.run("document.title")
        await connection.close()
    finally:
        await rig.close()
