"""The corpus: attacks by theme. `THEMES` are attempts to reach outside; bombs, changed state and forgeries stand beside."""

from tests.attack.corpus.attempt import ESCAPED, Attempt, source
from tests.attack.corpus.execution import EXECUTION
from tests.attack.corpus.kernel import KERNEL
from tests.attack.corpus.network import NETWORK
from tests.attack.corpus.others import SIGNALS
from tests.attack.corpus.secrets import FILES, PROCESSES
from tests.attack.corpus.writes import WRITES

THEMES: dict[str, tuple[Attempt, ...]] = {
    "secrets in files": FILES,
    "secrets of processes": PROCESSES,
    "network": NETWORK,
    "writes": WRITES,
    "execution": EXECUTION,
    "other processes": SIGNALS,
    "kernel": KERNEL,
}
EVERY = tuple(attempt for theme in THEMES.values() for attempt in theme)

__all__ = ["ESCAPED", "EVERY", "THEMES", "Attempt", "source"]
