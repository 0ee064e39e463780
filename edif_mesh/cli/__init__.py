"""The `edif` command: one file a noun."""
