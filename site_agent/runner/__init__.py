"""One confined child process an attempt: protocol, confinement, supervision."""
