"""Bombs: jobs that take too much time, memory, output or depth, or take their process down. Each ends its own job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MEMORY_BYTES = 256 << 20
LOG_BYTES = 20_000
RESULT_BYTES = 16 << 20
SHORT_MS = 1_200


@dataclass(frozen=True, slots=True)
class Bomb:
    """One job that ends itself. `codes`: how it may end, "" is well; `harm`: what it does where nothing bounds it."""

    name: str
    script: str
    codes: tuple[str, ...]
    harm: str
    """`time`, `memory`, `threads`, `printed`, `result`, `nesting`: more of it than the job's limit; `dies`: takes the process down."""
    limits: dict[str, Any] = field(default_factory=dict)


B = Bomb
_SHORT = {"wall_ms": SHORT_MS}
_TIME, _MEMORY, _CRASH = ("wall_time", "cpu_time"), ("out_of_memory",), ("runner_crashed",)
_BURN = """
import threading, torch
def burn():
    while True: torch.ones(300, 300) @ torch.ones(300, 300)
for _ in range(4): threading.Thread(target=burn, daemon=True).start()
while True: pass
"""
_CATCH_ALL = """
while True:
    try:
        while True: pass
    except BaseException: pass
"""
_DEAF = """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(100)
"""
_WEIGHTS = """
import torch
kept = []
while True: kept.append(torch.ones(1 << 20))
"""
_MAPPED = """
import mmap
kept = []
while True:
    kept.append(mmap.mmap(-1, 16 << 20))
    for page in range(0, 16 << 20, 4096): kept[-1][page] = 1
"""
_THREADS = """
import threading, time
threading.stack_size(32768)
for _ in range(3000): threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
time.sleep(100)
"""

BOMBS = (
    B("an endless loop", "while True: pass", _TIME, "time", _SHORT),
    B("an endless loop in native code", "import re; re.match('(a+)+$', 'a' * 60 + 'b')", _TIME, "time", _SHORT),
    B("a loop that catches everything", _CATCH_ALL, _TIME, "time", _SHORT),
    B("sleep", "import time; time.sleep(1000)", ("wall_time",), "time", _SHORT),
    B("sleep, deaf to every signal", _DEAF, ("wall_time",), "time", _SHORT),
    B("threads that burn", _BURN, _TIME, "time", _SHORT),
    B("a large tensor", "import torch; x = torch.ones(1 << 28)", _MEMORY, "memory"),
    B("many tensors", _WEIGHTS, _MEMORY, "memory"),
    B("a growing list", "x = []\nwhile True: x.append(bytearray(1 << 20))", _MEMORY, "memory"),
    B("many small objects", "x = []\nwhile True: x.append([0] * 100)", _MEMORY, "memory"),
    B("mapped memory", _MAPPED, (*_MEMORY, "user_error"), "memory"),
    B("a long number", "x = 1 << (1 << 34)", _MEMORY, "memory"),
    B("a long text", "x = 'x' * (1 << 31)", _MEMORY, "memory"),
    B("a thread bomb", _THREADS, ("too_many_threads", "user_error", "out_of_memory"), "threads"),
    B("a flood of lines", "for n in range(100_000): print('line', n)\noutcome = 1", ("",), "printed"),
    B("a flood of characters", "for n in range(50_000): print('x', end='', flush=True)\noutcome = 1", ("",), "printed"),
    B("a line without an end", "print('x' * 10_000_000)\noutcome = 1", ("",), "printed"),
    B("a large result", "import torch; outcome = torch.zeros(5 << 20)", ("result_too_large",), "result"),
    B("a large text as result", "outcome = 'x' * (20 << 20)", ("result_too_large",), "result"),
    B("a deep list", "outcome = []\nfor _ in range(50_000): outcome = [outcome]", ("unsupported_value",), "nesting"),
    B("a deep dictionary", "outcome = {}\nfor _ in range(50_000): outcome = {1: outcome}", ("unsupported_value",), "nesting"),
    B("a deep tuple", "outcome = ()\nfor _ in range(50_000): outcome = (outcome,)", ("unsupported_value",), "nesting"),
    B("endless recursion", "def f(): f()\nf()", ("user_error",), "dies"),
    B("recursion without a limit", "import sys; sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)", (*_CRASH, *_MEMORY, "user_error"), "memory"),
    B("leaving", "import os; os._exit(0)", _CRASH, "dies"),
    B("abort", "import os; os.abort()", _CRASH, "dies"),
    B("a segmentation fault", "import ctypes; ctypes.string_at(0)", _CRASH, "dies"),
    B("SystemExit", "raise SystemExit(0)", ("user_error",), "dies"),
    B("KeyboardInterrupt", "raise KeyboardInterrupt", ("user_error",), "dies"),
)  # fmt: skip
