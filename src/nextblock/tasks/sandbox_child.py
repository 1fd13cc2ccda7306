"""The inside of the sandbox: a script that limits itself, runs a program and replies (see sandbox.py).

It imports nothing of this package, and as little as it can, because every run starts it anew.
"""

from __future__ import annotations

import errno
import marshal
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

# System calls that pure computation and imports of the standard library need, with their numbers on
# x86_64 and aarch64 (None: does not exist there). From the kernel's tables, arch/x86/entry/syscalls/
# syscall_64.tbl and include/uapi/asm-generic/unistd.h. What is not here is refused.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "nanosleep": (35, 101),
    "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, None),
    "gettimeofday": (96, 169), "getrusage": (98, 165), "getuid": (102, 174), "getgid": (104, 176),
    "geteuid": (107, 175), "getegid": (108, 177), "sigaltstack": (131, 132), "gettid": (186, 178),
    "futex": (202, 98), "getdents64": (217, 61), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79),
    "readlinkat": (267, 78), "getrandom": (318, 278), "statx": (332, 291), "rseq": (334, 293),
}  # fmt: skip
_OPENAT = (257, 56)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Numbers of prctl and of classic BPF, from include/uapi/linux/{prctl,seccomp,bpf_common}.h.
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 1, 22, 38, 2
_LOAD_WORD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EACCES
_AT_NUMBER, _AT_ARCHITECTURE, _AT_ARGUMENT_2 = 0, 4, 32

_DENIED_MODULES = frozenset(
    (
        *("_ctypes", "_multiprocessing", "_posixshmem", "_posixsubprocess", "_socket", "_sqlite3", "_ssl"),
        *("ctypes", "fcntl", "mmap", "multiprocessing", "resource", "shutil", "socket", "sqlite3", "ssl"),
        *("subprocess", "tempfile", "urllib.request"),
    )
)
_DENIED_EVENTS = ("ctypes.", "fcntl.", "mmap.", "os.", "pty.", "resource.", "shutil.", "signal.", "socket.",
                  "sqlite3.", "subprocess.", "syslog.", "tempfile.", "webbrowser.")  # fmt: skip
# Acts on other processes or on file systems that raise no audit event.
_UNAUDITED = ("mkfifo", "mknod", "pidfd_open", "pidfd_send_signal", "sched_setaffinity", "sched_setparam",
              "sched_setscheduler", "setns", "setpriority", "splice", "sync", "unshare")  # fmt: skip
# What the import system itself does.
_HARMLESS_EVENTS = frozenset({"os.listdir", "os.scandir"})


def _filter_program(machine: str) -> list[tuple[int, int, int, int]] | None:
    """The seccomp filter as BPF instructions (code, jump if true, jump if false, operand).

    None for an architecture whose numbers we do not hold.
    """
    if machine not in _ARCHITECTURES:
        return None
    column, architecture = _ARCHITECTURES[machine]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    program = [
        (_LOAD_WORD, 0, 0, _AT_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD_WORD, 0, 0, _AT_NUMBER),
        # openat: only for reading. Its flags are the third argument.
        (_JUMP_EQUAL, 0, 4, _OPENAT[column]),
        (_LOAD_WORD, 0, 0, _AT_ARGUMENT_2),
        (_JUMP_ANY_BIT, 0, 1, writing),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for numbers in _ALLOWED.values():
        number = numbers[column]
        if number is not None:
            program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    return [*program, (_RETURN, 0, 0, _REFUSE)]


def _install_filter() -> bool:
    """Die with the parent, give up new privileges and filter system calls; False where that cannot be."""
    if sys.byteorder != "little" or sys.maxsize < 2**32:
        return False
    program = _filter_program(os.uname().machine)
    try:
        import ctypes
    except ImportError:
        return False
    if program is None:
        return False

    class Instruction(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction))]

    instructions = (Instruction * len(program))(*program)
    filter_ = Program(len(program), instructions)
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filter_), 0, 0) == 0


def _set_limits(seconds: float, memory_mib: int) -> None:
    memory = memory_mib << 20
    for limit, value in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        # A limit that is stricter already stays; raising it would be an error.
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (allowed, allowed))


def _audit_hook() -> Callable[[str, tuple[Any, ...]], None]:
    """A hook that refuses what the sandbox forbids; it holds copies of all it looks at."""
    readable = tuple(path + os.sep if os.path.isdir(path) else path for path in sys.path)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    denied_modules, denied_events, harmless = _DENIED_MODULES, _DENIED_EVENTS, _HARMLESS_EVENTS
    is_string, absolute = str, os.path.normpath

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            inside = type(path) is is_string and absolute(path).startswith(readable)
            if not inside or (flags or 0) & writing:
                raise PermissionError("the sandbox opens no file but the standard library's")
        elif event == "import":
            if arguments[0] in denied_modules:
                raise ImportError(f"the sandbox does not import {arguments[0]}")
        elif event == "sys._getframe":
            # The frames above the program hold the reply's first word. Callers in the standard library
            # (namedtuple, enum, typing) take this error for a stack that is not so deep.
            raise ValueError("call stack is not deep enough")
        elif event.startswith(denied_events) and event not in harmless:
            raise PermissionError(f"the sandbox forbids {event}")

    return hook


def main() -> None:
    """Read the task from standard input, lock the process, run the program, reply on the pipe."""
    with open(0, "rb", closefd=False) as stdin:
        nonce, source, expressions, seconds, memory_mib = marshal.load(stdin)
    pipe = os.dup(1)
    for descriptor in (0, 1):
        os.dup2(2, descriptor)  # standard error is the null device
    write, leave, encode = os.write, os._exit, str.encode
    _set_limits(seconds, memory_mib)
    _install_filter()
    # What the lock needed must not be at hand inside.
    for name in [name for name in sys.modules if name in _DENIED_MODULES or name.split(".")[0] == "ctypes"]:
        del sys.modules[name]
    for name in _UNAUDITED:
        for module in (os, sys.modules["posix"]):
            vars(module).pop(name, None)
    sys.addaudithook(_audit_hook())

    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<answer>", "exec", dont_inherit=True), namespace)
    # An f-string takes the repr without looking anything up that the program could have replaced.
    values = [f"{eval(compile(text, '<call>', 'eval', dont_inherit=True), namespace)!r}" for text in expressions]
    reply = memoryview(encode("\0".join([nonce, *values]), "utf-8", "backslashreplace"))
    while reply:
        reply = reply[write(pipe, reply) :]
    # No exit handlers or finalizers of the program after this.
    leave(0)


if __name__ == "__main__":
    main()
