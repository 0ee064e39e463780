"""Other programs and other processes: exec, fork in each of its forms, fork bombs, what would live on after the job."""

from tests.attack.corpus.attempt import Attempt

A = Attempt
_FORK_BOMB = """
for _ in range(50):
    if os.fork() == 0:
        time.sleep(100)
        os._exit(0)
"""
_DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(100)
    os._exit(0)
os.wait()
"""
_RAW = """
pid = call(56, 220, 17, 0, 0, 0, 0)
if pid == 0:
    call(60, 93, 0)
"""
_VFORK = "pid = call(57 if {plain} else 58, 220, 17, 0, 0, 0, 0)\nif pid == 0: call(60, 93, 0)"
_CLONE_3 = """
pid = call(435, 435, struct.pack("QQQQQQQQQQQ", 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88)
if pid == 0:
    call(60, 93, 0)
"""
_THREAD_ELSEWHERE = """
pid = call(56, 220, 0x10000000 | 17, 0, 0, 0, 0)
if pid == 0:
    call(60, 93, 0)
"""
_EXECVE = """
path, only = ctypes.create_string_buffer(b"/bin/true"), (ctypes.c_char_p * 2)(b"true", None)
call(59, 221, path, only, None)
"""
_EXECVEAT = """
path, only = ctypes.create_string_buffer(b"/bin/true"), (ctypes.c_char_p * 2)(b"true", None)
call(322, 281, -100, path, only, None, 0)
"""

EXECUTION = (
    A("become a shell", "os.execv('/bin/sh', ['sh', '-c', 'exit 77'])"),
    A("become a program without the C library", _EXECVE),
    A("become a program by its descriptor", _EXECVEAT),
    A("run a command", "subprocess.run(['/bin/true'])"),
    A("run a shell command", "status = os.system('true')\nif status: raise PermissionError(1, str(status))"),
    A("run the interpreter", "subprocess.run([sys.executable, '-S', '-c', 'pass'], check=True)"),
    A("posix_spawn", "os.posix_spawn('/bin/true', ['true'], {})"),
    A("fork", "in_a_child()"),
    A("fork without the C library", _RAW),
    A("the old fork", _VFORK.format(plain="X86")),
    A("clone3", _CLONE_3, "ENOSYS"),
    A("a process in a user namespace", _THREAD_ELSEWHERE),
    A("multiprocessing", "import multiprocessing; p = multiprocessing.get_context('fork').Process(target=int); p.start(); p.join()"),
    A("a fork bomb", _FORK_BOMB),
    A("a daemon that outlives the job", _DAEMON),
    A("a session of its own", "os.fork() == 0 or os._exit(0)\nos.setsid()", harmless="the fork that it needs is an attack of its own"),
    A("a process group of its own", "os.setpgid(0, 0)", harmless="a runner leads its session, where the kernel refuses it anyway"),
    A("adopt orphans", "call(157, 167, 36, 1, 0, 0, 0)"),
)  # fmt: skip
