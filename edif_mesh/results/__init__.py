"""Results: the safe archive, its signed manifest, and the transfer in chunks."""
