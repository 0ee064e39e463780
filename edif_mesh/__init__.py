"""The shared library of the mesh: vocabulary, wire, identity, results, transport, client, gateway and CLI."""

__version__ = "0.1.0"
