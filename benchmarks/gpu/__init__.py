"""Benchmarks that need a GPU; each says so and ends where there is none."""
