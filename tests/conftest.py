"""Settings of the whole suite."""

from __future__ import annotations

import os

from hypothesis import settings

# The gate draws the same examples on every machine; `make test-all` searches further, and prints how to repeat what it finds.
settings.register_profile("gate", derandomize=True)
settings.register_profile("search", print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))
