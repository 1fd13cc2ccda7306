"""Build the sdist and from it the wheel, unpack the wheel alone, and use the package from there.

Run by `make wheel`. Everything is built and unpacked in a temporary folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "nextblock"
SHIPPED_MODELS = ("tiny-ar", "tiny-bd")
WHEEL_LIMIT_MB = 16

# Runs outside the repository, with the unpacked wheel first on the path.
USE_THE_WHEEL = """
import importlib.metadata, pathlib, sys
import nextblock
here = pathlib.Path(nextblock.__file__).resolve().parent
assert here.parent == pathlib.Path(sys.argv[1]).resolve(), f"imported from {here}"
assert nextblock.__version__ == importlib.metadata.version("nextblock")
"""


def expected_files() -> set[str]:
    """Archive names of all that the wheel must hold: modules, type marker, models and presets."""
    source = {
        f"nextblock/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    presets = {f"nextblock/presets/{path.name}" for path in (ROOT / "presets").glob("*.yaml")}
    models = {
        f"nextblock/assets/{model}/{name}"
        for model in SHIPPED_MODELS
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    }
    if not presets:
        sys.exit("presets/ holds no .yaml file")
    return source | presets | models | {"nextblock/py.typed", "nextblock/__main__.py"}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="nextblock-wheel-") as folder:
        built, unpacked = Path(folder, "dist"), Path(folder, "site")
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(ROOT)]
        result = subprocess.run(build, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"{result.stdout}{result.stderr}\nthe build failed")
        (wheel,) = built.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            missing = expected_files() - set(archive.namelist())
        if missing:
            sys.exit("missing from the wheel: " + ", ".join(sorted(missing)))
        megabytes = wheel.stat().st_size / 1e6
        if megabytes > WHEEL_LIMIT_MB:
            sys.exit(f"the wheel has {megabytes:.1f} MB; the limit is {WHEEL_LIMIT_MB} MB")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", str(unpacked), str(wheel)], check=True)
        use = f"import sys; sys.path.insert(0, sys.argv[1])\n{USE_THE_WHEEL}"
        subprocess.run([sys.executable, "-c", use, str(unpacked)], check=True, cwd=folder)
        print(f"{wheel.name}: {megabytes:.1f} MB, complete, imports")


if __name__ == "__main__":
    main()
