"""Other systems on the traces of `benchmarks.traces`; each script runs in an environment of its own and says how to make it."""
