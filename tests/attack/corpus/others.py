"""Other processes: signals to host and agent in each of their forms, and calls that slow or starve them."""

from tests.attack.corpus.attempt import Attempt

A = Attempt
_INFO = "info = struct.pack('iii', 9, 0, -1).ljust(128, b'\\0')\n"
_PIDFD = "process = call(434, 434, AGENT, 0)\ncall(424, 424, process, 9, None, 0)"

SIGNALS = (
    A("kill the host", "os.kill(HOST, signal.SIGKILL)", kills="HOST"),
    A("kill the agent", "os.kill(AGENT, signal.SIGKILL)", kills="AGENT"),
    A("end the agent politely", "os.kill(AGENT, signal.SIGTERM)", kills="AGENT"),
    A("stop the agent", "os.kill(AGENT, signal.SIGSTOP)"),
    A("kill everybody", "os.kill(-1, signal.SIGKILL)", kills="HOST"),
    A("kill the host's group", "os.killpg(os.getpgid(HOST), signal.SIGKILL)", kills="HOST"),
    A("tgkill the host", "call(234, 131, HOST, HOST, 9)", kills="HOST"),
    A("tkill the host", "call(200, 130, HOST, 9)", kills="HOST"),
    A("queue a signal", _INFO + "call(129, 138, HOST, 9, info)", kills="HOST"),
    A("queue a signal to a thread", _INFO + "call(297, 240, HOST, HOST, 9, info)", kills="HOST"),
    A("a signal by the agent's pidfd", _PIDFD, kills="AGENT"),
    A("a signal by F_SETOWN", "fcntl.fcntl(sock(), 8, AGENT)"),
    A("another signal by F_SETSIG", "fcntl.fcntl(sock(), 10, 9)"),
    A("a signal by FIOSETOWN", "fcntl.ioctl(sock(), 0x8901, struct.pack('i', AGENT))"),
    A("limit the agent's processor time", "call(302, 261, AGENT, 0, struct.pack('QQ', 1, 1), None)"),
    A("limit the host's descriptors", "call(302, 261, HOST, 7, struct.pack('QQ', 1, 1), None)"),
    A("read the agent's limits", "call(302, 261, AGENT, 7, None, bytes(16))"),
    A("lower the agent's priority", "os.setpriority(os.PRIO_PROCESS, AGENT, 19)"),
    A("pin the agent to a core", "os.sched_setaffinity(AGENT, os.sched_getaffinity(0))"),
    A("idle the agent", "os.sched_setscheduler(AGENT, os.SCHED_IDLE, os.sched_param(0))"),
    A("read the agent's scheduling", "os.sched_rr_get_interval(AGENT)"),
    A("the agent's disk priority", "call(251, 30, 1, AGENT, 0x6000)"),
    A("move the host's pages", "call(256, 238, HOST, 8, struct.pack('Q', 1), struct.pack('Q', 1))"),
    A("advise the host's memory", "process = call(434, 434, HOST, 0)\ncall(440, 440, process, vector(id(None) & ~4095, 4096), 1, 20, 0)"),
    A("go before others", "os.setpriority(os.PRIO_PROCESS, 0, -10)", root=True),
    A("run in real time", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))", root=True),
    A("lock memory", "page = mmap.mmap(-1, 4096)\ncall(149, 228, address(page), 4096)"),
    A("shared memory that outlives it", "call(29, 194, 0x0ed1f, 4096, 0o1666)"),
    A("a semaphore that outlives it", "call(64, 190, 0x0ed1f, 1, 0o1666)"),
    A("a queue that outlives it", "call(68, 186, 0x0ed1f, 0o1666)"),
    A("a POSIX queue that outlives it", "call(240, 180, b'edif-escape', os.O_CREAT | os.O_RDWR, 0o600, None)"),
    A("a timer that signals", "call(222, 107, 0, struct.pack('QiiI', 0, 9, 0, 0).ljust(64, b'\\0'), bytearray(4) and ctypes.create_string_buffer(4))"),
)  # fmt: skip
