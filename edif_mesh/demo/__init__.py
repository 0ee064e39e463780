"""The demonstration that `make demo` runs: a real experiment on two sites, one of which is killed under it."""
