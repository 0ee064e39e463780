"""The Python client: submit, watch, fetch, cancel; the nnsight backend."""
