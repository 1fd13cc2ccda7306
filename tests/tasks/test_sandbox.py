"""The sandbox: plain code runs, hostile code scores nothing and harms nothing."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nextblock.tasks import sandbox_child
from nextblock.tasks.sandbox import evaluate_python

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")


def run_python(source: str, **limits: Any) -> bool:
    """Whether a program reaches its end in the sandbox."""
    return evaluate_python(source, (), **limits) is not None


@pytest.mark.parametrize(
    "source",
    [
        "",
        "x = sum(range(10))\nassert x == 45",
        "import bisect, collections, dataclasses, datetime, decimal, enum, fractions, functools, heapq\n"
        "import itertools, json, math, operator, os, random, re, statistics, string, sys, time, typing\n"
        "P = collections.namedtuple('P', 'a b')\nassert P(1, 2).b == 2 and math.sqrt(4) == 2\n"
        "assert re.sub('a', 'b', 'aa') == 'bb' and random.random() < 1 and time.time() > 0",
        "print('x' * 100000)\nimport sys\nsys.stderr.write('y' * 100000)",
        "assert __name__ == '__main__'",
        "def f(n):\n    return 1 if n == 0 else n * f(n - 1)\nassert f(200) > 0",
        "x = [0] * 1_000_000",
        "s = '\u00e9\u4e2d'\nassert len(s) == 2",
    ],
)
def test_plain_code_reaches_its_end(source: str) -> None:
    assert run_python(source)


@pytest.mark.parametrize(
    "source",
    ["assert 1 == 2", "1 / 0", "x = (", "\0", "raise SystemExit", "import sys\nsys.exit(0)", "exit(0)",
     "quit()",  "import os\nos._exit(0)", "import os\nos.abort()", "raise KeyboardInterrupt",
     "def f(): return f()\nf()",
     "import atexit, sys\natexit.register(print)\nsys.exit()", "import ctypes\nctypes.string_at(0)"],
)  # fmt: skip
def test_failing_or_leaving_code_is_false(source: str) -> None:
    assert not run_python(source)


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "while True: print('x' * 10000)",
        "import time\ntime.sleep(60)",
        "import os\nwhile True: os.write(3, b'x' * 65536)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import signal\nfor s in (2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "x = 7 ** 10 ** 8",
    ],
)
def test_endless_code_is_stopped_in_time(source: str) -> None:
    start = time.monotonic()
    assert not run_python(source, seconds=0.5)
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize("source", ["x = bytearray(1 << 30)", "x = [0]\nwhile True: x += x", "x = 'a' * (1 << 31)"])
def test_memory_is_limited(source: str) -> None:
    assert not run_python(source)


def test_the_memory_limit_is_the_callers() -> None:
    source = "x = bytearray(300 << 20)"
    assert not run_python(source, memory_mib=256)
    assert run_python(source, memory_mib=600)


def _left_over() -> list[str]:
    """Processes of the sandbox that this process or, as orphans, the first one now has to mind."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (folder / "cmdline").read_bytes(), (folder / "status").read_text()
        except OSError:
            continue
        parent = next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:"))
        if b"sandbox_child" in command and parent in ("1", str(os.getpid())):
            found.append(folder.name)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.fork()",
        "import os\nwhile True: os.fork()",
        "import os\nif os.fork() == 0:\n    while True: pass",
        "import os\nos.system('true')",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import os\nos.popen('true')",
        "import subprocess",
        "import multiprocessing",
        "import _posixsubprocess",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import os\nos.setsid()",
    ],
)
def test_no_process_program_or_thread_is_started(source: str) -> None:
    assert not run_python(source)
    assert _left_over() == []


ESCAPE = """
import sys, os
failed = []
def attempt(act):
    try:
        act()
    except BaseException as error:
        failed.append(error)
"""


def _all_refused(acts: list[str]) -> None:
    """Each act raises inside the sandbox; run together, because the program may catch the errors."""
    source = ESCAPE + "".join(f"attempt(lambda: {act})\n" for act in acts)
    assert evaluate_python(source, ["len(failed)"]) == [str(len(acts))]


def test_no_file_is_written_changed_or_removed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    new, path = str(tmp_path / "new"), str(victim)
    _all_refused(
        [
            f"open({new!r}, 'w')",
            f"open({path!r}, 'a')",
            f"open({path!r}, 'r+')",
            "open('here', 'w')",
            f"os.open({new!r}, os.O_CREAT | os.O_RDWR)",
            f"os.open({path!r}, os.O_TRUNC)",
            f"__import__('io').FileIO({new!r}, 'w')",
            f"os.remove({path!r})",
            f"os.rename({path!r}, {new!r})",
            f"os.mkdir({new!r})",
            f"os.rmdir({str(tmp_path)!r})",
            f"os.chmod({path!r}, 0)",
            f"os.truncate({path!r}, 0)",
            f"os.symlink({path!r}, {new!r})",
            f"os.link({path!r}, {new!r})",
            f"os.mkfifo({new!r})",
            f"os.utime({path!r}, (0, 0))",
            f"os.chdir({str(tmp_path)!r})",
            f"__import__('shutil').rmtree({str(tmp_path)!r})",
            "__import__('tempfile').mkstemp()",
        ]
    )
    assert victim.read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["victim"]


def test_no_file_outside_the_standard_library_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    _all_refused(
        [
            f"open({str(secret)!r})",
            f"os.open({str(secret)!r}, os.O_RDONLY)",
            f"open({os.fsencode(secret)!r})",
            "open('/etc/passwd')",
            "open(os.__file__ + '/../../../../../../../../etc/passwd')",
            f"open('/proc/{os.getpid()}/environ')",
            "open('/proc/self/mem')",
            "open(4)",
        ]
    )


def test_no_network() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    _all_refused(
        [
            f"__import__('socket').create_connection(('127.0.0.1', {port}))",
            "__import__('_socket').socket()",
            f"__import__('urllib.request').request.urlopen('http://127.0.0.1:{port}')",
            f"__import__('http.client').client.HTTPConnection('127.0.0.1', {port}).connect()",
            "__import__('ssl')",
        ]
    )
    server.settimeout(0)
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()


def test_no_process_is_signalled() -> None:
    me = os.getpid()
    _all_refused(
        [f"os.kill({me}, 9)", f"os.killpg({os.getpgid(0)}, 9)", "os.kill(os.getppid(), 9)", "os.kill(-1, 9)",
         f"os.pidfd_open({me})", f"os.sched_setaffinity({me}, [0])", f"os.setpriority(0, {me}, 5)"]
    )  # fmt: skip


def test_the_lock_cannot_be_undone_from_inside() -> None:
    _all_refused(
        [
            "__import__('ctypes')",
            "__import__('_ctypes')",
            "__import__('resource').setrlimit",
            "__import__('__main__').resource.setrlimit(7, (64, 64))",
            "__import__('__main__').sys.modules['ctypes']",
            "sys._getframe(1)",
            "os.setuid(0) or os.setgid(1)",
        ]
    )


def test_environment_and_folder_are_empty_and_the_folder_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "secret")
    values = evaluate_python("import os", ["os.environ.get('SOME_SECRET')", "os.listdir()", "os.getcwd()"])
    assert values is not None
    assert values[:2] == ["None", "[]"]
    assert not Path(values[2].strip("'")).exists()


def test_values_come_back_as_repr_in_order() -> None:
    assert evaluate_python("x = 2", ["x", "x == 2", "'\u00e9'", "[x] * 2"]) == [
        "2",
        "True",
        "'\u00e9'",
        "[2, 2]",
    ]


def test_an_expression_that_raises_gives_nothing() -> None:
    assert evaluate_python("x = 2", ["x", "y"]) is None


@pytest.mark.parametrize("reply", ["b''", "b'True'", "b'0' * 32", "(b'0' * 32 + bytes(1)) * 3", "bytes(100)"])
def test_a_forged_reply_is_not_believed(reply: str) -> None:
    send = f"for fd in range(20):\n    try: os.write(fd, {reply})\n    except OSError: pass\n"
    assert not run_python(f"import os\n{send}os._exit(0)")


def test_a_repr_cannot_add_or_hide_values() -> None:
    source = "class Liar:\n    def __repr__(self): return '1' + chr(0) + '2'"
    assert evaluate_python(source, ["Liar()"]) is None


def test_a_run_is_quick() -> None:
    start = time.monotonic()
    for _ in range(10):
        assert run_python("x = 1")
    assert (time.monotonic() - start) / 10 < 0.5


# --- the seccomp filter, read by a small interpreter of classic BPF ----------------------------------


def _verdict(machine: str, number: int, flags: int = 0, architecture: int | None = None) -> int:
    """What the filter returns for one system call whose third argument is `flags`."""
    program = sandbox_child._filter_program(machine)
    assert program is not None
    assert len(program) < 256
    known = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    data = {0: number, 4: known if architecture is None else architecture, 32: flags}
    accumulator, place = 0, 0
    while True:
        code, if_true, if_false, operand = program[place]
        place += 1
        if code == 0x20:  # load a word
            accumulator = data[operand]
        elif code == 0x15:  # jump if equal
            place += if_true if accumulator == operand else if_false
        elif code == 0x45:  # jump if any bit is set
            place += if_true if accumulator & operand else if_false
        else:
            assert code == 0x06  # return
            return operand


ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EACCES
# socket, clone, execve, kill, unlinkat, ptrace, clone3, io_uring_setup
FORBIDDEN = {
    "x86_64": (41, 56, 59, 62, 263, 101, 435, 425),
    "aarch64": (198, 220, 221, 129, 35, 117, 435, 425),
}
READ_WRITE_OPENAT = {"x86_64": (0, 1, 257), "aarch64": (63, 64, 56)}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_lets_only_the_listed_calls_through(machine: str) -> None:
    read, write, openat = READ_WRITE_OPENAT[machine]
    column = ["x86_64", "aarch64"].index(machine)
    allowed = {numbers[column] for numbers in sandbox_child._ALLOWED.values()} | {openat}
    assert {number for number in range(500) if _verdict(machine, number) == ALLOW} == allowed - {None}
    assert {read, write} <= allowed
    assert not allowed & set(FORBIDDEN[machine])


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_opens_for_reading_only(machine: str) -> None:
    openat = READ_WRITE_OPENAT[machine][2]
    assert _verdict(machine, openat, os.O_RDONLY | os.O_CLOEXEC) == ALLOW
    for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND):
        assert _verdict(machine, openat, flag | os.O_CLOEXEC) == REFUSE


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_kills_calls_of_another_architecture(machine: str) -> None:
    assert _verdict(machine, READ_WRITE_OPENAT[machine][0], architecture=0x40000003) == KILL


def test_the_filter_refuses_what_the_audit_hook_does_not_see() -> None:
    if not sandbox_child._filter_program(os.uname().machine):
        pytest.skip("no seccomp filter for this machine")
    _all_refused(["os.mkfifo('/tmp/nextblock-fifo')", "os.dup(3)", "os.pipe()", "os.nice(1)", "os.umask(0)"])
