"""A whole mesh on one machine, as separate processes under one supervisor: `edif up`, the demonstration, the tests."""
