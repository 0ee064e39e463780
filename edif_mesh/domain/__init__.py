"""Values of the mesh and their transition tables: plain data, no I/O, no clock."""
