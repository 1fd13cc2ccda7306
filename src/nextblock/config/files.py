"""YAML; files that are written whole or not at all, and why a disk did not take one."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from nextblock.config.errors import UsageError, one_line

PARTIAL = ".partial-"
"""How the names of folders begin that are not yet whole."""
MARKS = ("config.json", "adapter_config.json")
"""Files by which a folder is known to hold a model or an adapter."""

LOCK = ".lock"
"""File in a run's folder that names the process which writes there."""

STALE_SECONDS = 3600.0
"""After which a part of a file is of a process that was killed."""

SHOWN_LETTERS = 100
"""Of a path that is too long for the system, in a message."""

UNWRITTEN = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
}
"""What to do about each error of the system that stops a write."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `1e-4` is a number, `010`, `0b11` and `1:30` are none, and no key comes twice."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """The node of a mapping, before merge keys are laid out."""
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and isinstance(key, yaml.ScalarNode):
                where = key.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key '{name}' comes twice", where)
            seen.add(name)
        return node


class _Dumper(yaml.SafeDumper):
    """What `_Loader` reads back: a text like `1e-4` is quoted."""


for _yaml in (_Loader, _Dumper):
    _number = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.[\d_]+)[eE][-+]?\d+$")
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _number, list("-+.0123456789"))
for _first, _kinds in _Loader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = [one for one in _kinds if not one[0].endswith((":int", ":float"))]
_NUMBERS = {
    "int": r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F]+)$",
    "float": rf"{_number.pattern}|[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$",
}
for _kind, _form in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_form), list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The value that a YAML text holds. UsageError if it is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of a day that does not exist
        raise UsageError(f"not YAML: {one_line(error)}") from None


def to_yaml(values: Any) -> str:
    """Plain values as YAML, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def unwritten(error: BaseException) -> tuple[str, str] | None:
    """Why a disk did not take a file and what to do, in words; None for any other error."""
    number, text = getattr(error, "errno", None), str(error)
    if number is None and (named := re.search(r"\(os error (\d+)\)", text)):  # safetensors and tokenizers
        number = int(named[1])
    if number in UNWRITTEN:
        return os.strerror(number), UNWRITTEN[number]
    if isinstance(error, RuntimeError) and re.search("inline_container|iostream error", text):  # torch.save
        return "a file could not be written, most likely because the disk is full", "free space"
    return None


def expanded(name: str | Path, what: str = "path") -> Path:
    """A path with the home folder in place of `~`; `what` it names, for the message. UsageError: no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UsageError(f"{what} {name} is in the home folder of an unknown user; write the whole path") from None


def user_path(name: str | Path, what: str = "path") -> Path:
    """A path as a user gives it, `expanded`; it need not exist.

    Raises:
        UsageError: no such user, or the system cannot look there.
    """
    path = expanded(name, what)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: of a null byte
        why, shown = getattr(error, "strerror", None) or one_line(error), str(name)
        shown = shown if len(shown) <= SHOWN_LETTERS else f"{shown[:SHOWN_LETTERS]}..."
        raise UsageError(f"{what} {shown!r} cannot be looked up: {why}; name a file or folder") from None
    return path


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. UsageError where that cannot be."""
    if folder.is_file():
        raise UsageError(f"output {folder} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output folder {folder} cannot be made: {error.strerror}; choose another") from None


@contextmanager
def locked(folder: Path, name: str = LOCK, what: str = "") -> Iterator[None]:
    """A folder for this process alone; made if missing with those above it, and gone again if nothing was put there.

    name: of the lock's file, where not the folder is meant but `what` in it.

    The lock ends with the process, however that ends, and holds on all machines that see the folder.

    Raises:
        UsageError: another process has it, or it cannot be made.
    """
    import fcntl  # here, because Windows has none, and decoding works there

    made = [one for one in (folder, *folder.parents) if not one.exists()]  # the innermost first
    make_folder(folder)
    path = folder / name
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise UsageError(
                f"{what or f'output folder {folder}'} is in use by {holder}; wait for its end, or stop it first"
            ) from None
        except OSError as error:  # some network file systems
            warnings.warn(f"{folder} cannot be locked ({error.strerror}); start no second run there", stacklevel=3)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()  # the holder before has just removed the file that was opened here
    with file:
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # what has something in it stays
                for one in made:
                    one.rmdir()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder; what the block has put there moves into `folder` when it is done, else nothing does.

    What is already in `folder` stays, but for files of the same name and for weights of an earlier export.
    """
    partial = folder / f"{PARTIAL}export"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        # A folder without these is no model, and they go first and come last: it is one with all its files or not.
        for name in MARKS:
            (folder / name).unlink(missing_ok=True)
        for old in folder.glob("model*.safetensors*"):  # perhaps in other parts than the new ones
            old.unlink()
        for part in sorted(partial.iterdir(), key=lambda part: part.name in MARKS):
            if part.is_dir():
                shutil.rmtree(folder / part.name, ignore_errors=True)
            os.replace(part, folder / part.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file complete or not at all, on the disk itself; in place of one of that name, whose rights it keeps."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")  # others may write it too
    try:
        for old in path.parent.glob(f".{glob.escape(path.name)}.*part"):
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                old.unlink(missing_ok=True)
    except OSError:  # another has just moved or removed it
        pass
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if path.exists():
            part.chmod(path.stat().st_mode & 0o777)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(figures: Any, output: Path | None) -> None:
    """Write plain values as JSON, whole or not at all, where an output is named. UsageError if it cannot be."""
    if output is None:
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, f"{json.dumps(figures, indent=1)}\n".encode())
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None
