"""The coordinator's shell: the single-writer loop, inbox, outbox, recovery."""
