"""The live page in a real browser: it shows what the mesh does, and a job's name stays text."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from tests.integration.coordinator_rig import Researcher, Rig, Site

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
]
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")


async def render(url: str, profile: Path, *more: str) -> str:
    """Return the page's DOM after its script ran for some seconds."""
    process = await asyncio.create_subprocess_exec(
        str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--timeout=4000", *more, "--dump-dom", url,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    return out.decode()


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
        dom = await render(rig.url, tmp_path / "profile")
        await connection.close()
    finally:
        await rig.close()
    assert "<title>broken in" not in dom
    assert "&lt;script&gt;document.title" in dom
    assert "&lt;img src=x" in dom
    assert ">ansbach<" in dom
    assert 'class="state good">live<' in dom
