"""The rules of a site: what it starts, stops and reports. Plain values; no I/O, no clock, no randomness."""
