"""The lane's parser: any split of the same bytes gives the same messages, and no bytes break it."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from edif_mesh.transport.lane import Lane

HEADERS = b"NATS/1.0\r\nNats-Msg-Id: 7\r\n\r\n"


def frame(subject: str, data: bytes, headers: bytes, reply: str) -> bytes:
    words = [subject, "1", *([reply] if reply else [])]
    if headers:
        line = f"HMSG {' '.join(words)} {len(headers)} {len(headers) + len(data)}\r\n"
    else:
        line = f"MSG {' '.join(words)} {len(data)}\r\n"
    return line.encode() + headers + data + b"\r\n"


def feed(lane: Lane, raw: bytes, splits: list[int]) -> None:
    """Give the bytes in pieces, as a socket would."""
    at = 0
    for step in (*splits, *[4096] * (len(raw) // 4096 + 1), len(raw)):
        piece = raw[at : at + step]
        while piece and not lane._error:
            view = lane.get_buffer(-1)
            taken = min(len(view), len(piece))
            assert taken > 0
            view[:taken] = piece[:taken]
            view.release()
            lane.buffer_updated(taken)
            piece, at = piece[taken:], at + taken


messages = st.tuples(
    st.sampled_from(["a", "edif.v1.x"]),
    st.one_of(st.binary(max_size=200), st.integers(16_000, 50_000).map(bytes)),
    st.sampled_from([b"", HEADERS]),
    st.sampled_from(["", "_INBOX.r"]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(messages, max_size=6), st.lists(st.integers(1, 40_000), max_size=20))
def test_every_split_gives_the_same_messages(sent: list, splits: list[int]) -> None:
    async def run() -> None:
        lane, got = Lane(), []
        lane._receivers[1] = lambda m: got.append((m.subject, bytes(m.data), m.headers, m.reply))
        feed(lane, b"+OK\r\n".join(frame(*message) for message in sent), splits)
        assert got == sent
        lane.close()
        lane.info.exception()

    asyncio.run(run())


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.one_of(st.binary(max_size=60), st.sampled_from([b"MSG a 1 ", b"HMSG a 1 9 ", b"\r\n", b"INFO ", b"-1"]))
    ),
    st.lists(st.integers(1, 50), max_size=20),
)
def test_no_bytes_break_the_parser(pieces: list[bytes], splits: list[int]) -> None:
    async def run() -> None:
        lane = Lane()
        feed(lane, b"".join(pieces), splits)
        lane.close()
        lane.info.exception()

    asyncio.run(run())


async def test_an_announced_giant_is_refused_before_it_is_allocated() -> None:
    lane = Lane()
    feed(lane, b"MSG a 1 99999999999\r\n", [])
    assert "impossible size" in lane._error
    lane.close()
    lane.info.exception()
