"""The journal after kill -9 in the middle of writing, on a full disk, and when somebody altered it."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from edif_mesh.domain.ids import AttemptNumber, Digest, Epoch
from site_agent.core.changes import Audited, EpochRaised, OldForgotten, PairSeen
from site_agent.journal import Journal, JournalError

ROOT = Path(__file__).resolve().parent.parent.parent
WRITER = """
import sys
from pathlib import Path
from site_agent.core.changes import *
from site_agent.journal import Journal
journal = Journal(Path(sys.argv[1]))
number = 0
while True:
    number += 1
    journal.commit([EpochRaised(number), PairSeen((f"{number:064x}", 1), 10**15), Audited("seen", str(number))], number)
    print(number, flush=True)
"""


def a_pair(number: int) -> PairSeen:
    return PairSeen((Digest(f"{number:064x}"), AttemptNumber(1)), 1_000 + number)


@pytest.mark.parametrize("after", [1, 40, 300])
def test_what_was_committed_before_kill_9_is_there_and_whole(tmp_path: Path, after: int) -> None:
    path = tmp_path / "journal.db"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert writer.stdout is not None
    last = 0
    while last < after:
        last = int(writer.stdout.readline())
    writer.kill()
    last = max([last, *(int(line) for line in writer.stdout.read().split())])
    writer.wait(10)
    writer.stdout.close()
    journal = Journal(path)
    remembered = journal.load()
    count = len(remembered.seen)
    # At most the one transaction that was committed and not yet printed.
    assert last <= count <= last + 1
    assert remembered.epoch == count == len(journal.audit())
    journal.close()


def test_a_second_agent_on_the_same_state_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    with pytest.raises(JournalError, match="another agent"):
        Journal(tmp_path / "journal.db")
    journal.close()


def test_a_full_disk_is_a_sentence_and_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    journal.commit([a_pair(1)], 1)
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(JournalError, match="full"):
        journal.commit([EpochRaised(Epoch(9)), *(a_pair(number) for number in range(2, 2_000))], 2)
    assert journal.load().seen == {(Digest(f"{1:064x}"), 1): 1_001}
    assert journal.load().epoch == 0
    journal._db.execute("PRAGMA max_page_count=100000")
    journal.commit([a_pair(2)], 3)
    assert len(journal.load().seen) == 2
    journal.close()


def test_a_damaged_file_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"no database at all" * 1_000)
    with pytest.raises(JournalError, match="cannot be used"):
        Journal(path)


@pytest.mark.parametrize(
    "change",
    ["UPDATE audit SET detail = 'nothing' WHERE number = 2", "DELETE FROM audit WHERE number = 2"],
)
def test_an_altered_audit_log_is_noticed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "journal.db"
    journal = Journal(path)
    for number in range(4):
        journal.commit([Audited("refused: replay", str(number))], number)
    assert [line[3] for line in journal.audit()] == ["0", "1", "2", "3"]
    journal.close()
    with sqlite3.connect(path) as database:
        database.execute(change)
    database.close()
    journal = Journal(path)
    with pytest.raises(JournalError, match="altered at line 2"):
        journal.audit()
    journal.close()


def test_what_can_no_longer_start_is_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    journal.commit([a_pair(1), a_pair(2)], 1)
    journal.commit([OldForgotten(1_002)], 2)
    assert list(journal.load().seen.values()) == [1_002]
    journal.close()
