"""Every attack of the corpus as a job through a real mesh, under every profile, as root and as an ordinary user.

What must hold: each attempt ends in the refusal that its row names, each bomb and forgery in its sentence, and the next
job is equal to the bit to the first. `test_unconfined` shows that the same scripts do harm where nothing confines them.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_mesh.domain.job import JobStatus
from edif_mesh.domain.site import SandboxProfile
from edif_mesh.errors import ArchiveError
from tests import ordinary_user
from tests.attack.arena import Arena, arena, ordinary_users, what_is_lacking
from tests.attack.corpus import THEMES, source
from tests.attack.corpus.bombs import BOMBS, LOG_BYTES
from tests.attack.corpus.frames import FORGERIES, sends
from tests.attack.corpus.state import REFERENCE, STATE
from tests.attack.test_archive_hostile import LIES, one, tensor
from tests.models import TINY
from tests.submitting import load

WAYS = [
    pytest.param((profile, user), marks=[pytest.mark.slow] if (profile, user) == ("strict", ordinary_user.UID) else [])
    for user in ordinary_users()
    for profile in SandboxProfile
]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"{way[0]}-{'root' if way[1] == 0 else 'user'}")
def attacked(request: pytest.FixtureRequest) -> Iterator[Arena]:
    profile, user = request.param
    if user == ordinary_user.UID and (closed := ordinary_user.closed_to_others()):
        pytest.skip(f"An ordinary user cannot read {', '.join(closed)} (chmod -R o+rX).")
    if lacking := what_is_lacking(profile, user):
        assert profile is not SandboxProfile.BASE, lacking
        pytest.skip(f"{profile} does not hold here: {lacking}")
    with arena(profile, user) as ready:
        yield ready


@pytest.mark.parametrize("theme", THEMES)
def test_what_reaches_outside_is_refused(attacked: Arena, theme: str) -> None:
    attempts = THEMES[theme]
    outcome = attacked.run(source(attempts, attacked.names)).values["outcome"]
    assert set(outcome) == {attempt.name for attempt in attempts}
    contained = {attempt.name: attempt.refused_as(attacked.profile) for attempt in attempts}
    assert {name: said for name, said in outcome.items() if said not in contained[name]} == {}
    attacked.is_unharmed()


def test_a_bomb_ends_its_own_job_and_no_other(attacked: Arena) -> None:
    ended = attacked.run_all([(bomb.script, bomb.limits) for bomb in BOMBS])
    wrong = {
        bomb.name: end.last.text
        for bomb, end in zip(BOMBS, ended, strict=True)
        if end.code not in bomb.codes or sum(map(len, end.printed)) > LOG_BYTES + 200
    }
    assert wrong == {}
    attacked.is_unharmed()


def test_what_a_job_changes_is_its_own(attacked: Arena) -> None:
    sources = [(job, {}) for script in STATE.values() for job in (script, REFERENCE)]
    said = dict(zip(STATE, attacked.run_all(sources)[1::2], strict=True))
    changed = [name for name, ended in said.items() if ended.values.get("outcome") != attacked.reference]
    assert changed == []
    attacked.is_unharmed()


def test_a_forged_frame_ends_the_job_that_sent_it(attacked: Arena) -> None:
    ended = attacked.run_all([(forgery.source(), {"wall_ms": 4_000}) for forgery in FORGERIES])
    wrong = {
        forgery.name: (end.code, end.last.text)
        for forgery, end in zip(FORGERIES, ended, strict=True)
        if end.code != forgery.code or forgery.says not in end.last.text
    }
    assert wrong == {}
    attacked.is_unharmed()


HOSTILE = (
    *("pickle", "deep json", "deep tree", "references explode", "hash explodes", "duplicate key", "storages huge"),
    *("tensor stride 1e18", "tensor repeats", "empty giant", "numpy objects", "namedtuple code", "dunder attribute"),
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_by_both_clients(attacked: Arena, name: str) -> None:
    script = sends(LIES[name])
    ended = attacked.run(script)
    assert ended.last.status is JobStatus.SUCCEEDED  # to the site it is bytes, which it signs and never opens
    assert isinstance(ended.error, ArchiveError)
    assert str(ended.error)
    last = attacked.through_the_gateway(script)[-1]
    assert last["status"] == "ERROR"
    assert str(ended.error) in last["description"]


def test_unmodified_nnsight_runs_nothing_of_a_hostile_archive(attacked: Arena, tmp_path: Path) -> None:
    """A pickle that would leave a mark if anybody opened it, in the archive's place."""
    marker = tmp_path / "opened"
    script = sends(pickle.dumps(_Marks(str(marker))))
    model = load(TINY)
    from nnsight import CONFIG  # after `load`, which has said that there is no hub
    from nnsight.intervention.backends.remote import RemoteError

    CONFIG.API.HOST, before = attacked.mesh.gateway_url, CONFIG.API.HOST
    try:
        with pytest.raises(RemoteError, match="archive"), model.trace("Hello world", remote=True):
            exec(script)
            outcome = model.output.save()
    finally:
        CONFIG.API.HOST = before
    assert isinstance(attacked.run(script).error, ArchiveError)
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Marks(str(marker))))
    assert marker.exists()


class _Marks:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_class_that_a_hostile_archive_names_is_data(attacked: Arena) -> None:
    """Names that look like modules: nothing is imported, and the value says what it is."""
    ended = attacked.run(sends(one({"t": "object", "c": "antigravity.Surprise", "v": []})))
    assert "antigravity" not in sys.modules
    assert type(ended.values["x"]).__module__.startswith("edif_mesh.")


SPEAKING_ON = """
def more():
    for _ in range(1000): say(LOG, b'still here')
    failed(code='user_error', text='no')
    say(DATA, bytes(8))
threading.Thread(target=more).start()
"""


def test_what_follows_the_end_is_never_read(attacked: Arena) -> None:
    ended = attacked.run(sends(one(tensor()), after=SPEAKING_ON))
    assert ended.values["x"].shape == (4, 4)
    assert ended.printed == []
    attacked.is_unharmed()
