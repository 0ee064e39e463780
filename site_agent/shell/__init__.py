"""The agent's shell: the single-writer loop, inbox, outbox, heartbeat."""
