"""Ports (bus, blob store) and their NATS and in-memory adapters; the embedded server."""
