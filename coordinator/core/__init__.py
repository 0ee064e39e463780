"""The coordinator's rules: plain functions over plain values; no I/O, no clock, no randomness."""
