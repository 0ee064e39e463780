"""Calls that open the kernel: namespaces, mounts, tracing, programs in the kernel, privileges, the machine itself."""

from tests.attack.corpus.attempt import Attempt

A = Attempt
_SETNS = "number = os.open(f'/proc/{AGENT}/ns/uts', 0)\ncall(308, 268, number, 0)"
_RING = "call(425, 425, 8, ctypes.create_string_buffer(120))"
_BPF = "call(321, 280, 0, struct.pack('IIII', 2, 4, 8, 1).ljust(64, b'\\0'), 64)"
_PERF = "call(298, 241, struct.pack('IIQ', 1, 112, 1).ljust(112, b'\\0'), 0, -1, -1, 0)"
_PIVOT = """
call(272, 97, 0x20000)
call(165, 40, b"none", b"/", None, 0x44000, None)
call(165, 40, b"none", SCRATCH.encode(), b"tmpfs", 0, None)
os.mkdir(SCRATCH + "/old")
call(155, 41, SCRATCH.encode(), (SCRATCH + "/old").encode())
"""
_BIND = "call(165, 40, SECRET.encode(), TARGET.encode(), None, 4096, None)\nassert open(TARGET).read() == 'secret'"
_FILTER = "call(317, 277, 2, 0, struct.pack('I', 0x7fff0000))"
_CAPSET = "call(126, 91, struct.pack('Ii', 0x20080522, 0), struct.pack('6I', 1 << 21, 1 << 21, 0, 0, 0, 0))"

KERNEL = (
    A("a user namespace", "call(272, 97, 0x10000000)"),
    A("a mount namespace", "call(272, 97, 0x20000)", root=True),
    A("a network namespace", "call(272, 97, 0x40000000)", root=True),
    A("a pid namespace", "call(272, 97, 0x20000000)", root=True),
    A("a control group namespace", "call(272, 97, 0x02000000)", root=True),
    A("join the agent's namespace", _SETNS, "EACCES", root=True),
    A("join any namespace", "call(308, 268, call(434, 434, AGENT, 0), 0x04000000)", root=True),
    A("mount", "call(165, 40, b'none', SCRATCH.encode(), b'tmpfs', 0, None)", root=True),
    A("mount a secret over another file", _BIND, root=True),
    A("the new mount calls", "call(430, 430, b'tmpfs', 0)", root=True),
    A("open a tree", "call(428, 428, -100, b'/', 1)", root=True),
    A("unmount", "call(165, 40, b'none', SCRATCH.encode(), b'tmpfs', 0, None)\ncall(166, 39, SCRATCH.encode(), 2)", root=True),
    A("another root", _PIVOT, root=True),
    A("io_uring", _RING),
    A("a program in the kernel", _BPF, root=True),
    A("performance counters", _PERF, root=True),
    A("page faults of its own", "call(323, 282, 1)"),
    A("a keyring", "call(248, 217, b'user', b'edif-escape', b'x', 1, -2)"),
    A("a keyring of others", "call(250, 219, 0, -3, 1, 0, 0)"),
    A("the kernel's log", "assert call(103, 116, 10, None, 0) > 0", root=True),
    A("the machine's name", "call(170, 161, b'edif-escape', 11)", root=True),
    A("the machine's clock", "call(227, 112, 0, struct.pack('qq', *divmod(time.time_ns(), 10**9)))", harmless="a test does not set the machine's clock"),
    A("tune the clock", "call(159, 171, ctypes.create_string_buffer(208))"),
    A("restart the machine", "call(169, 142, 0, 0, 0, 0)", harmless="a test does not restart the machine; without the magic numbers nothing happens"),
    A("a module for the kernel", "call(175, 105, 0, 0, b'')", harmless="no test brings a module that this kernel would take"),
    A("another kernel", "call(246, 104, 0, 0, 0, 0)", harmless="a test does not load another kernel"),
    A("swap", "call(167, 224, TARGET.encode(), 0)", harmless="a test does not give the machine a swap file"),
    A("accounting to a file", "call(163, 89, TARGET.encode())\ncall(163, 89, None)", root=True),
    A("input and output ports", "call(173, -1, 0x80, 1, 1) if X86 else call(-1, -1)", "EPERM|ENOSYS", root=True),
    A("a segment of its own", "call(154, -1, 0, bytes(64), 64) if X86 else call(-1, -1)", "EPERM|ENOSYS"),
    A("another personality", "call(135, 92, 0x0040000)"),
    A("another filter", _FILTER),
    A("a Landlock of its own", "call(444, 444, struct.pack('Q', 1), 8, 0)"),
    A("be dumpable again", "call(157, 167, 4, 1, 0, 0, 0)"),
    A("drop the death signal", "call(157, 167, 1, 0, 0, 0, 0)"),
    A("keep capabilities", "call(157, 167, 8, 1, 0, 0, 0)"),
    A("become root", "os.setresuid(0, 0, 0)", root=True),
    A("become another user", "os.setresuid(12345, 12345, 12345)", root=True),
    A("change its group", "os.setresgid(0, 0, 0)", root=True),
    A("join other groups", "os.setgroups([0])", root=True),
    A("take a capability", _CAPSET, root=True),
    A("raise its own limits", "call(302, 261, 0, 1, struct.pack('QQ', 1 << 30, 1 << 30), None)"),
)  # fmt: skip
