"""The system calls that a runner may make: a seccomp filter, default deny, built by hand for x86-64 and aarch64.

What is not on the list fails with EPERM. Refused among others: exec, fork (threads are allowed), every socket call that
makes or connects one, ptrace, process_vm_*, mount, unshare, setns, io_uring, bpf, memfd_create, keyctl, kill of others.

Some calls reach other processes of the same user by an argument, and are allowed for harmless arguments only: `prlimit64`
(the agent's CPU limit could be set to a second), `fcntl` (F_SETOWN and F_SETSIG have the kernel send any signal; F_SETLEASE
and locks hold up others' files) and `ioctl` (FIOSETOWN does the same, SIOCGIFCONF names the network's interfaces).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass

from edif_mesh.errors import SandboxError

# BPF opcodes (linux/bpf_common.h) and seccomp return values (linux/seccomp.h).
_LOAD, _EQUAL, _SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_MASK, _ABOVE = 0x54, 0x25
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_CLONE_THREAD, _CLONE_NEW_ANYTHING = 0x00010000, 0x7E020080
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER, _TSYNC = 1, 1

_PRCTL = (15, 16, 0x53564D41)
"""PR_SET_NAME, PR_GET_NAME, PR_SET_VMA (names of an allocator's areas)."""
_FCNTL = (0, 1, 2, 3, 4, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC."""
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS and TIOCGWINSZ (is it a terminal?), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""

_NVIDIA_TYPE, _UVM_MOST, _UVM_START = 0x46, 0xFF, (0x30000001, 0x30000002)
"""Requests of a GPU's driver: all of its type, of unified memory the small plain numbers, and the two that begin and end it. No
socket, file or terminal knows any of them but FIBMAP and FIGETBSZ (1, 2), which tell nothing to a runner."""

_NAMES = """read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn pread64 pwrite64
readv writev sched_yield mremap madvise dup nanosleep clock_nanosleep getpid gettid sendto recvfrom shutdown getsockopt
exit exit_group uname getcwd sysinfo getuid geteuid getgid getegid getppid futex
sched_getaffinity clock_gettime clock_getres gettimeofday openat newfstatat statx readlinkat faccessat faccessat2
getdents64 set_robust_list get_robust_list rseq getrandom ppoll pselect6 epoll_create1 epoll_ctl epoll_pwait eventfd2
membarrier sigaltstack set_tid_address restart_syscall getrusage times fadvise64 getpriority get_mempolicy timerfd_create
timerfd_settime mincore fsync fdatasync ftruncate getcpu rt_sigtimedwait rt_sigpending pipe2 statfs fstatfs
sched_getparam sched_getscheduler""".split()

_X86_64 = dict(
    read=0, write=1, close=3, fstat=5, lseek=8, mmap=9, mprotect=10, munmap=11, brk=12, rt_sigaction=13,
    rt_sigprocmask=14, rt_sigreturn=15, ioctl=16, pread64=17, pwrite64=18, readv=19, writev=20, sched_yield=24,
    mremap=25, mincore=27, madvise=28, dup=32, nanosleep=35, getpid=39, sendto=44, recvfrom=45,
    shutdown=48, getsockopt=55, clone=56, exit=60, uname=63, fcntl=72, fsync=74, fdatasync=75, ftruncate=77,
    getcwd=79, gettimeofday=96, getrusage=98, sysinfo=99, times=100, getuid=102, getgid=104, geteuid=107, getegid=108,
    getppid=110, rt_sigpending=127, rt_sigtimedwait=128, sigaltstack=131, statfs=137, fstatfs=138, getpriority=140,
    sched_getparam=143, sched_getscheduler=145, prctl=157, gettid=186, futex=202, sched_getaffinity=204,
    getdents64=217, set_tid_address=218, restart_syscall=219, fadvise64=221, clock_gettime=228, clock_getres=229,
    clock_nanosleep=230, exit_group=231, epoll_ctl=233, tgkill=234, get_mempolicy=239, openat=257, newfstatat=262,
    readlinkat=267, faccessat=269, pselect6=270, ppoll=271, set_robust_list=273, get_robust_list=274, epoll_pwait=281,
    timerfd_create=283, timerfd_settime=286, eventfd2=290, epoll_create1=291, pipe2=293, prlimit64=302, getcpu=309,
    getrandom=318, membarrier=324, statx=332, rseq=334, clone3=435, faccessat2=439,
)  # fmt: skip
# Old calls that only x86-64 has: stat, poll, lstat, access, select, open, readlink, arch_prctl, time, epoll_wait.
_X86_64_ONLY = (4, 7, 6, 21, 23, 2, 89, 158, 201, 232)
_AARCH64 = dict(
    getcwd=17, eventfd2=19, epoll_create1=20, epoll_ctl=21, epoll_pwait=22, dup=23, fcntl=25, ioctl=29,
    statfs=43, fstatfs=44, ftruncate=46, faccessat=48, openat=56, close=57, pipe2=59, getdents64=61, lseek=62, read=63,
    write=64, readv=65, writev=66, pread64=67, pwrite64=68, pselect6=72, ppoll=73, readlinkat=78, newfstatat=79,
    fstat=80, fsync=82, fdatasync=83, timerfd_create=85, timerfd_settime=86, exit=93, exit_group=94,
    set_tid_address=96, futex=98, set_robust_list=99, get_robust_list=100, nanosleep=101, clock_gettime=113,
    clock_getres=114, clock_nanosleep=115, sched_getscheduler=120, sched_getparam=121, sched_getaffinity=123,
    sched_yield=124, restart_syscall=128, tgkill=131, sigaltstack=132, rt_sigaction=134, rt_sigprocmask=135,
    rt_sigpending=136, rt_sigtimedwait=137, rt_sigreturn=139, getpriority=141, times=153, uname=160, getrusage=165,
    prctl=167, getcpu=168, gettimeofday=169, getpid=172, getppid=173, getuid=174, geteuid=175, getgid=176, getegid=177,
    gettid=178, sysinfo=179, sendto=206, recvfrom=207, getsockopt=209, shutdown=210, brk=214,
    munmap=215, mremap=216, clone=220, mmap=222, fadvise64=223, mprotect=226, mincore=232, madvise=233,
    get_mempolicy=236, prlimit64=261, getrandom=278, membarrier=283, statx=291, rseq=293, clone3=435, faccessat2=439,
)  # fmt: skip


@dataclass(frozen=True)
class _Arch:
    audit: int
    calls: dict[str, int]
    more: tuple[int, ...]


_ARCHES = {"x86_64": _Arch(0xC000003E, _X86_64, _X86_64_ONLY), "aarch64": _Arch(0xC00000B7, _AARCH64, ())}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def supported() -> bool:
    """Return whether there is a table for this machine's architecture."""
    return platform.machine() in _ARCHES


def build_filter(pid: int, *, devices: bool = False) -> bytes:
    """Return the filter as BPF instructions for a process whose id is `pid`; raises SandboxError.

    With `devices` it may also make the requests of a GPU's driver.
    """
    arch = _ARCHES.get(platform.machine())
    if arch is None:
        raise SandboxError(f"There is no system call table for {platform.machine()}; runners cannot be confined here.")
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, arch.audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if platform.machine() == "x86_64":  # the x32 ABI has the same audit value and other numbers
        code += [(0x35, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for name in _NAMES:
        code += [(_EQUAL, 0, 1, arch.calls[name]), (_RETURN, 0, 0, _ALLOW)]
    for number in arch.more:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    # clone: threads only. clone3 hides its flags in memory: say ENOSYS, and the C library falls back to clone.
    code += [(_EQUAL, 0, 1, arch.calls["clone3"]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    code += [(_EQUAL, 0, 5, arch.calls["clone"]), (_LOAD, 0, 0, 16), (_SET, 1, 0, _CLONE_NEW_ANYTHING)]
    code += [(_SET, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    code += _only(arch.calls["tgkill"], 0, (pid,))  # abort() and raise()
    code += _only(arch.calls["prlimit64"], 0, (0,))  # 0 is the caller
    code += _only(arch.calls["prctl"], 0, _PRCTL)
    code += _only(arch.calls["fcntl"], 1, _FCNTL)
    if devices:
        code += _device_requests(arch.calls["ioctl"])
    code += _only(arch.calls["ioctl"], 1, _IOCTL)
    code.append((_RETURN, 0, 0, _ERRNO | errno.EPERM))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _only(call: int, argument: int, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Allow `call` where the low 32 bits of its `argument` (from 0) are one of `values`; else EPERM."""
    count = len(values)
    tests = [(_EQUAL, count - number, 0, value) for number, value in enumerate(values)]
    start = [(_EQUAL, 0, count + 3, call), (_LOAD, 0, 0, 16 + 8 * argument)]
    return [*start, *tests, (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]


def _device_requests(call: int) -> list[tuple[int, int, int, int]]:
    """Allow `ioctl` for requests of a GPU's driver; anything else falls through to the next rule, with the call's number loaded."""
    first, last = _UVM_START
    return [
        (_EQUAL, 0, 8, call),
        (_LOAD, 0, 0, 24),  # the low half of the request; the kernel reads no more of it
        (_EQUAL, 4, 0, first),
        (_EQUAL, 3, 0, last),
        (_ABOVE, 0, 2, _UVM_MOST),
        (_MASK, 0, 0, 0xFF00),
        (_EQUAL, 0, 1, _NVIDIA_TYPE << 8),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, 0),
    ]


def install_filter(*, devices: bool = False) -> None:
    """Confine all threads of this process and all that they start; needs no_new_privs. Raises SandboxError."""
    raw = build_filter(os.getpid(), devices=devices)
    program = _Program(len(raw) // 8, raw)
    libc = ctypes.CDLL(None, use_errno=True)
    # 0 is success; above it, the id of a thread that could not be included.
    if libc.syscall(_SECCOMP[platform.machine()], _SET_MODE_FILTER, _TSYNC, ctypes.byref(program)) != 0:
        raise SandboxError(f"The kernel refused the system call filter: {os.strerror(ctypes.get_errno())}.")
