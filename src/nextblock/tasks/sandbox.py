"""Running code that nobody has read, without harm.

A fresh interpreter (`sandbox_child.py`) in a session of its own limits itself, then runs the code:

* resource limits: processor time, memory, no file growth, few open files, no core dump, and (for a
  user other than root) no new process;
* a seccomp filter (Linux on x86_64 and aarch64) that lets through the few system calls that plain
  Python needs and refuses the rest: no process, thread, network, signal, program or file for writing;
* an audit hook, which refuses the same acts by their Python names, and reading of files other than
  the standard library; it is the only one of the two where seccomp does not exist;
* nothing inherited: empty environment, an empty temporary working folder, no open file but a pipe.

The parent keeps the clock, kills the whole process group at the end, reads a bounded amount, and
believes only a reply that starts with a random word that it made up for this run.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_CHILD = Path(__file__).with_name("sandbox_child.py")
# More than any reply of a right answer; a flood of output ends the run.
_REPLY_BYTES = 1 << 20


def _read_reply(pipe: IO[bytes], seconds: float) -> bytes | None:
    """All bytes until the pipe closes; None when that takes too long or they are too many."""
    deadline = time.monotonic() + seconds
    reply = b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while len(reply) <= _REPLY_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return None
        part = os.read(pipe.fileno(), 1 << 16)
        if not part:
            return reply
        reply += part
    return None


def evaluate_python(
    source: str, expressions: Sequence[str], seconds: float = 2.0, memory_mib: int = 256
) -> list[str] | None:
    """Run a program in the sandbox, then evaluate expressions in its namespace.

    Values that the caller compares with never enter the sandbox, so the program cannot fake them.

    Args:
        source: the program; it runs as `__main__` and prints to nowhere.
        expressions: Python expressions, evaluated in turn once the program has reached its end.
        seconds: wall-clock limit of everything, start of the interpreter included.
        memory_mib: limit of the address space.

    Returns:
        The `repr` of each value; None when the program or an expression raised, did not end in time,
        left early (`sys.exit`, `os._exit`), was killed, or answered too much.
    """
    nonce = secrets.token_hex(16)
    task = marshal.dumps((nonce, source, list(expressions), seconds, memory_mib))
    # Some interpreters find their own shared library through this variable only.
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="nextblock-") as folder, tempfile.TemporaryFile() as stdin:
        stdin.write(task)
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            reply = _read_reply(process.stdout, seconds)
        finally:
            # Before the child is reaped its process group cannot belong to anyone else.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
    if reply is None:
        return None
    first, *values = reply.decode("utf-8", "replace").split("\0")
    return values if first == nonce and len(values) == len(expressions) else None
