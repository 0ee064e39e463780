"""Limits as a person writes them on the command line."""

import pytest

from edif_mesh.client.limits import with_limits
from edif_mesh.domain.job import Limits
from edif_mesh.errors import ConfigError


def test_each_limit_is_read_with_its_unit_and_the_others_stay() -> None:
    given = ["wall=1.5h", "cpu=90s", "memory=16GB", "result=512MiB", "log=100KB"]
    assert with_limits(Limits(), given) == Limits(5_400_000, 16 * 10**9, 512 << 20, 100_000, 90_000)
    assert with_limits(Limits(wall_ms=7), ["memory=1B"]) == Limits(wall_ms=7, memory_bytes=1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("time=3s", "no limit 'time'"),
        ("wall=3", "wall=90min"),
        ("memory=2h", "GiB"),
        ("log=-1MB", "log=16GB"),
        ("", "wall=..."),
    ],
)
def test_what_cannot_be_read_is_answered_with_what_can(given: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_limits(Limits(), [given])
