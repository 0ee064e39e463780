"""The same scripts where nothing confines them: each does its harm, so a refusal in a runner means something."""

from __future__ import annotations

import os

import pytest

from tests.attack import victim
from tests.attack.corpus import ESCAPED, EVERY
from tests.attack.corpus.bombs import BOMBS
from tests.attack.corpus.state import STATE
from tests.attack.explosions import explosions, meddling

ABSENT = {f"refused: {name}" for name in ("ENOSYS", "EAFNOSUPPORT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "EOPNOTSUPP")}
"""What a kernel says that has no such thing: such an attempt shows nothing on this machine and does not count."""
AT_LEAST = 60


@pytest.fixture(scope="module")
def suffered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    return victim.outcomes(tmp_path_factory.mktemp("victim"))


def test_every_attempt_escapes_where_nothing_confines_it(suffered: dict[str, dict[str, object]]) -> None:
    attempts = [attempt for attempt in EVERY if not attempt.harmless and (os.getuid() == 0 or not attempt.root)]
    said = {attempt.name: suffered[attempt.name] for attempt in attempts}
    assert {name: got for name, got in said.items() if got["outcome"] not in {ESCAPED, *ABSENT}} == {}
    killed = {attempt.name: [attempt.kills] for attempt in attempts if attempt.kills}
    assert {name: got["killed"] for name, got in said.items() if got["killed"]} == killed
    assert sum(got["outcome"] == ESCAPED for got in said.values()) >= AT_LEAST


def test_what_is_called_harmless_says_why() -> None:
    assert all(len(attempt.harmless) > 20 for attempt in EVERY if attempt.harmless)
    names = [attempt.name for attempt in EVERY] + [bomb.name for bomb in BOMBS] + list(STATE)
    assert len(names) == len(set(names))


def test_every_bomb_goes_off_where_nothing_bounds_it() -> None:
    assert explosions() == {bomb.name: bomb.harm for bomb in BOMBS}


def test_every_change_reaches_the_next_job_where_both_share_a_process() -> None:
    assert meddling() == dict.fromkeys(STATE, True)
