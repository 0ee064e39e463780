"""The NDIF-compatible HTTP and WebSocket endpoint of unmodified nnsight."""
