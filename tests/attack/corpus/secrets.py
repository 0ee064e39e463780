"""Secrets: by file, environment, /proc, memory, tracing and descriptors."""

from tests.attack.corpus.attempt import Attempt

A = Attempt
_MEMORY = """
mine = bytearray(64)
got = call(310, 270, HOST, vector(address(mine), 64), 1, vector(id(None), 64), 1, 0)
assert got == 64
"""
_WRITE_MEMORY = """
mine = bytearray(struct.pack("q", 7))
assert call(311, 271, HOST, vector(address(mine), 8), 1, vector(id(Ellipsis), 8), 1, 0) == 8
"""
_HANDLE = """
handle = bytearray(struct.pack("Ii", 128, 0) + bytes(128))
mount = bytearray(4)
folder = os.open(STATE, os.O_RDONLY) if "victim" in SECRET else -100
call(303, 264, -100, SECRET.encode(), ctypes.c_void_p(address(handle)), ctypes.c_void_p(address(mount)), 0)
number = call(304, 265, folder, ctypes.c_void_p(address(handle)), os.O_RDONLY)
assert b"secret" in os.read(number, 100)
"""
_OWN_MEMORY = """
import gc
wanted = TOKEN[::-1]
found = [1 for o in gc.get_objects() if isinstance(o, dict) for v in list(o.values()) if v is not wanted and v == wanted]
found += [1 for v in os.environ.values() if v == wanted]
first = ctypes.c_void_p.in_dll(libc, "environ").value
while first and (entry := ctypes.c_char_p.from_address(first).value):
    found += [1] if wanted.encode() in entry else []
    first += 8
found or nothing_found()
"""
_DESCRIPTORS = """
for number in range(3, 512):
    try:
        kind = os.fstat(number).st_mode
    except OSError:
        continue
    if stat.S_ISREG(kind):
        assert b"secret" in os.pread(number, 100, 0)
        break
else:
    nothing_found()
"""
_STEAL = """
process = call(434, 434, AGENT, 0)
call(438, 438, process, 0, 0)
"""

FILES = (
    A("read a secret that anybody may read", "assert open(SECRET).read() == 'secret'", "EACCES"),
    A("read the site's key", "assert open(KEY).read()", "EACCES"),
    A("list the agent's folder", "assert os.listdir(STATE)", "EACCES"),
    A("another model's files", "assert os.listdir(OTHER)", "EACCES"),
    A("read /etc/passwd", "assert open('/etc/passwd').read()", "EACCES"),
    A("read /etc/shadow", "assert open('/etc/shadow').read()", "EACCES", root=True),
    A("list the home folder of root", "os.listdir(os.path.expanduser('~root'))", "EACCES", root=True),
    A("list the root folder", "os.listdir('/')", "EACCES"),
    A("climb out of a folder that it may read", "open(os.path.dirname(os.path.realpath(os.__file__)) + '/..' * 20 + SECRET).read()", "EACCES"),
    A("open a path only, then read it by its descriptor", "open(f'/proc/self/fd/{os.open(SECRET, os.O_PATH)}').read()", "EACCES"),
    A("open relative to a folder's descriptor", "os.open(os.path.basename(SECRET), 0, dir_fd=os.open(os.path.dirname(SECRET), os.O_PATH))", "EACCES"),
    A("through /proc/self/root", "open('/proc/self/root' + SECRET).read()", "EACCES"),
    A("through the host's root", "open(f'/proc/{HOST}/root' + SECRET).read()", "EACCES"),
    A("through the host's working folder", "os.listdir(f'/proc/{HOST}/cwd')", "EACCES"),
    A("openat2", "call(437, 437, -100, SECRET.encode(), bytes(24), 24)"),
    A("by a file handle", _HANDLE, root=True),
    A("the kernel's log by file", "os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK)", "EACCES", root=True),
    A("the kernel's symbols", "assert open('/proc/kallsyms').readline()", "EACCES"),
    A("devices of the machine", "os.listdir('/sys/class')", "EACCES"),
)  # fmt: skip

PROCESSES = (
    A("read the host's environment", "open(f'/proc/{HOST}/environ').read()", "EACCES"),
    A("read the agent's environment", "assert TOKEN[::-1] in open(f'/proc/{AGENT}/environ').read()", "EACCES"),
    A("read its own environment from /proc", "open('/proc/self/environ').read()", "EACCES"),
    A("a secret in its own environment or memory", _OWN_MEMORY, "ENODATA"),
    A("list processes", "assert os.listdir('/proc')", "EACCES"),
    A("the agent's command line", "assert open(f'/proc/{AGENT}/cmdline').read()", "EACCES"),
    A("the host's memory map", "assert open(f'/proc/{HOST}/maps').read()", "EACCES"),
    A("its own memory map", "assert open('/proc/self/maps').read()", "EACCES"),
    A("read the host's memory by file", "open(f'/proc/{HOST}/mem', 'rb')", "EACCES"),
    A("write its own memory by file", "open('/proc/self/mem', 'wb')", "EACCES"),
    A("the agent's descriptors by file", "assert os.listdir(f'/proc/{AGENT}/fd')", "EACCES"),
    A("the host's stack", "open(f'/proc/{HOST}/stack').read()", "EACCES", root=True),
    A("read the host's memory", _MEMORY),
    A("write the host's memory", _WRITE_MEMORY),
    A("attach to the host", "call(101, 117, 16, HOST, 0, 0)"),
    A("seize the agent", "call(101, 117, 0x4206, AGENT, 0, 0)"),
    A("be traced", "call(101, 117, 0, 0, 0, 0)"),
    A("compare kernel objects", "call(312, 272, HOST, AGENT, 1, 0, 0)"),
    A("a descriptor that the host left open", _DESCRIPTORS, "ENODATA"),
    A("take a descriptor out of the agent", _STEAL),
    A("send a descriptor", "folder = os.open(os.path.dirname(os.__file__), 0)\nbuffer = bytearray(b'x'); head = bytearray(vector(address(buffer), 1)); "
      "control = bytearray(struct.pack('Qiii', 20, 1, 1, folder) + bytes(4))\n"
      "assert call(46, 211, sock(), struct.pack('QQQQQQQ', 0, 0, address(head), 1, address(control), 24, 0), 0) == 1"),
    A("receive a descriptor", "buffer = bytearray(1); head = bytearray(vector(address(buffer), 1)); control = bytearray(64)\n"
      "try: call(47, 212, sock(), struct.pack('QQQQQQQ', 0, 0, address(head), 1, address(control), 64, 0), 0x40)\n"
      "except BlockingIOError: pass"),
)  # fmt: skip
