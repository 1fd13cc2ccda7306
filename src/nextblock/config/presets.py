"""Find the configurations that come with the package."""

from __future__ import annotations

from pathlib import Path

from nextblock.config.errors import UsageError, nearest
from nextblock.config.files import user_path


def preset(name: str) -> Path:
    """A preset by name, from the installed package or from a checkout of the repository.

    Dashes and dots stand for underscores: `qwen3-0.6b` is `qwen3_0_6b.yaml`.

    Raises:
        UsageError: there is none of that name.
    """
    here = Path(__file__).parents[1]
    folder = here / "presets" if (here / "presets").is_dir() else here.parents[1] / "presets"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    stem = name.replace("-", "_").replace(".", "_")
    if stem not in names:
        raise UsageError(f"there is no preset '{name}'{nearest(stem, names)}")
    return folder / f"{stem}.yaml"


def find_config(argument: str) -> Path:
    """A YAML path as given, or else the preset of that name (`demo`, `presets/demo.yaml`)."""
    path = user_path(argument, "configuration")
    if path.is_file():
        return path
    if path.suffix not in (".yaml", ".yml"):
        return preset(path.name)
    try:
        return preset(path.stem if path.parent.name in ("", "presets") else "")
    except UsageError as error:
        near = f" ({error})" if "did you mean" in str(error) else ""
        raise UsageError(
            f"configuration {argument} does not exist; give a YAML file or a preset's name{near}"
        ) from None
