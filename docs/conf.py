"""How Sphinx makes docs/ into a site (`make docs`).

The API reference is made from the docstrings, package by package.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import nextblock

# ------------------------------------------------------------------------------------------------- site

project = "nextblock"
author = copyright = "the nextblock authors"
version = release = nextblock.__version__
html_title = f"nextblock {release}"
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4  # a link to a heading has the same anchor as on GitHub
exclude_patterns = ["_build"]

# A link or a name of ours that leads nowhere fails the build (-W). Names of other libraries would need a network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!nextblock).*"),
    ("py:.*", r"nextblock\..*\.[A-Z]"),  # type variables
]
suppress_warnings = ["ref.python"]  # two classes of ours may have attributes of one name

# ---------------------------------------------------------------------------------------- API reference

default_role = "code"  # docstrings are read in the source first: single backticks mean code there
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_default_options = {"exclude-members": "model_config"}
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"

API = Path(__file__).parent / "api"
PACKAGES = (
    "config",
    "tasks",
    "attention",
    "data",
    "model",
    "recipe",
    "training",
    "decoding",
    "measure",
    "workflows",
    "lm_eval",
    "server",
    "vllm",
    "cli",
)
PUBLIC = "# nextblock\n\nThe names that `import nextblock as nb` gives. Everything else may change between versions.\n"
RUN_ON_IMPORT = "sandbox_child"  # a script for a process of its own: it would limit ours


def write_api_pages(app: Any) -> None:
    """One page for the public names, and one for each package with all its modules. Git ignores them."""
    API.mkdir(exist_ok=True)
    for page in API.glob("*.md"):
        page.unlink()
    # Names that a module only passes on are described where they are defined; the public page shows them once more.
    own, public = ("members", "show-inheritance", "ignore-module-all"), ("members", "show-inheritance", "no-index")
    (API / "index.md").write_text(
        f"{PUBLIC}\n{automodule('nextblock', public)}\n```{{toctree}}\n:hidden:\n\n" + "\n".join(PACKAGES) + "\n```\n",
        encoding="utf-8",
    )
    for name in PACKAGES:
        package = importlib.import_module(f"nextblock.{name}")
        inner = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
        parts = [f"# {package.__name__}\n\n{automodule(package.__name__, own)}"]
        parts += [f"## {m}\n\n{automodule(m, own)}" for m in inner if not m.endswith(RUN_ON_IMPORT)]
        (API / f"{name}.md").write_text("\n".join(parts), encoding="utf-8")


def automodule(name: str, options: tuple[str, ...]) -> str:
    """The directive that shows a module's docstrings."""
    return "\n".join([f"```{{eval-rst}}\n.. automodule:: {name}", *(f"   :{o}:" for o in options), "```\n"])


AS_WRITTEN: dict[str, list[str]] = {}


def before_napoleon(app: Any, what: str, name: str, owner: Any, options: Any, lines: list[str]) -> None:
    """Put the heading "Attributes:" above a class's list of `name: meaning`, which the docstrings leave out."""
    AS_WRITTEN[name] = list(lines)
    if what not in ("class", "exception"):
        return
    names = {name for base in inspect.getmro(owner) for name in inspect.get_annotations(base)}
    entry = re.compile(rf"({'|'.join(names) or '$'}): ")
    start = next((i for i, line in enumerate(lines) if entry.match(line) and not lines[i - 1]), None)
    if start is not None:
        end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
        lines[start:end] = ["Attributes:", *(f"    {line}" for line in lines[start:end])]


def after_napoleon(app: Any, what: str, name: str, owner: Any, options: Any, lines: list[str]) -> None:
    """Of an attribute, words before a colon are no type."""
    if any(line.startswith(":type:") for line in lines):
        lines[:] = AS_WRITTEN[name]


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("builder-inited", write_api_pages)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
