"""Keys, the trust store and the replay window."""
