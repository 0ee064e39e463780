"""Where a host's process begins: `python -m site_agent.hosting.launch FD KIND PROFILE`, with the control socket FD.

KIND is the module that it then becomes: `host`, or `zygote` for a model whose weights runners map.

Namespaces come before everything heavy: a user namespace can be entered by a process with one thread only, and the process
that stays behind to wait (see `Enclosure.enter`) should be a small one. So this imports no torch; the host then does.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys

from edif_mesh.domain.site import SandboxProfile
from edif_mesh.errors import SandboxError
from site_agent.runner.namespaces import Enclosure
from site_agent.runner.process import die_with_parent


def main() -> None:
    """Enter what the profile demands, then become the host."""
    die_with_parent()
    control, enclosure = socket.socket(fileno=int(sys.argv[1])), Enclosure(SandboxProfile(sys.argv[3]))
    try:
        enclosure.enter()
    except SandboxError as error:
        control.sendall(json.dumps({"error": str(error)}).encode())
        return
    pidfd = os.pidfd_open(os.getpid())
    socket.send_fds(control, [json.dumps({"host": os.getpid()}).encode()], [pidfd])
    os.close(pidfd)
    importlib.import_module(f"site_agent.hosting.{sys.argv[2]}").main(control, enclosure)


if __name__ == "__main__":
    main()
