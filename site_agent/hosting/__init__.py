"""Model hosts: load, keep warm, lend to children."""
