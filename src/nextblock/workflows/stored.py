"""The decoding options that a checkpoint stores as its own defaults, changed in place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextblock.config.errors import UsageError
from nextblock.config.files import user_path, write_whole
from nextblock.decoding.options import DEPENDENT
from nextblock.model.loading import SHIPPED


def writable_folder(model: str | Path) -> Path:
    """The folder whose settings `--write` changes; asked before anything is measured.

    Raises:
        UsageError: a shipped model, a Hub id, or a folder that cannot be written.
    """
    folder = user_path(model, "model")
    if str(model) in SHIPPED:
        raise UsageError(f"--write: {model} is a shipped model and stays as it is; copy it first, and tune the copy")
    if not folder.is_dir():
        raise UsageError(f"--write: {model} is not a local folder; copy it first, and tune the copy")
    if not os.access(folder, os.W_OK) or not os.access(folder / "config.json", os.W_OK):
        raise UsageError(
            f"--write: {folder / 'config.json'} cannot be written; copy the folder first, and tune the copy"
        )
    return folder


def write_decoding(folder: Path, decoding: Mapping[str, Any]) -> Path:
    """Put default arguments of `generate` into a checkpoint's config.json; returns its path.

    Options that `decoding` does not name stay as they are, and so does all else in the file. But of options whose
    values must fit each other none stays beside one that is written: the trial that chose it ran without them.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    section = config["block_diffusion"]
    replaced = {name for together in DEPENDENT if set(together) & set(decoding) for name in together}
    kept = {name: value for name, value in section.get("decoding", {}).items() if name not in replaced}
    section["decoding"] = {**kept, **decoding}
    try:
        write_whole(path, (json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    return path
