"""What crosses the broker: messages, subjects, codec and signed envelopes."""
