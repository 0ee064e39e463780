"""The network: every family of sockets that a kernel has, names, and what could be done with the runner's own socket."""

from tests.attack.corpus.attempt import Attempt

A = Attempt
_SOCKET = "socket.socket({0})"
_EVERY = """
opened, errors = [], set()
for family in range(1, 46):
    for kind in (1, 2, 3, 5):
        try:
            opened.append(socket.socket(family, kind))
        except OSError as error:
            errors.add(error.errno)
if not opened:
    assert errors == {errno.EPERM}, errors
    raise PermissionError(errno.EPERM, "none")
"""
_TCP = """
with socket.create_connection(("127.0.0.1", PORT), 5) as line:
    line.sendall(TOKEN.encode())
"""
_CONNECT_OWN = """
place = struct.pack("H", 1) + UNIX.encode() + bytes(1)
fresh = call(41, 198, 1, 1, 0)
call(42, 203, fresh, place, len(place))
"""

NETWORK = (
    A("TCP to a service of the machine", _TCP),
    A("TCP over IPv6", "socket.socket(socket.AF_INET6, socket.SOCK_STREAM)"),
    A("UDP", "assert socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT)) == 1"),
    A("UDP over IPv6", "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)"),
    A("listen", "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()"),
    A("a raw socket", "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", root=True),
    A("multipath TCP", "socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)"),
    A("a unix socket of a service", "socket.socket(socket.AF_UNIX).connect(UNIX)"),
    A("a unix socket without the C library", _CONNECT_OWN),
    A("an abstract unix socket", r"s = socket.socket(socket.AF_UNIX); s.bind('\0edif-escape'); s.listen()"),
    A("a unix datagram", "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)"),
    A("netlink: routes", "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); s.bind((0, 0))"),
    A("netlink: events of the kernel", "socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15)"),
    A("packets of the wire", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 768)", root=True),
    A("vsock: the machine around this one", "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)"),
    A("the kernel's ciphers", "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)"),
    A("any of 45 families", _EVERY),
    A("a pair of sockets", "socket.socketpair()"),
    A("resolve a name", "socket.getaddrinfo('localhost', 80)", "EAI"),
    A("names of the interfaces", "assert socket.if_nameindex()"),
    A("interfaces through its own socket", "fcntl.ioctl(sock(), 0x8912, struct.pack('iP', 0, 0).ljust(16))"),
    A("connect its own socket anew", "call(42, 203, sock(), struct.pack('H', 0), 2)", harmless="a connected pair cannot be connected anew"),
    A("options of its own socket", "socket.socket.setsockopt and call(54, 208, sock(), 1, 7, struct.pack('i', 4096), 4)"),
    A("who is at the other end of its socket", "call(52, 205, sock(), bytes(128), struct.pack('i', 128))"),
)  # fmt: skip
