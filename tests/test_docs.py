"""The documentation names only what exists: commands, options, keys, links, Python names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import nextblock as nb
from nextblock.cli.main import app
from nextblock.cli.options import decoding_options
from nextblock.cli.train import parse_overrides
from nextblock.config.errors import UsageError
from nextblock.config.presets import preset
from nextblock.config.run import load_config
from nextblock.config.sections import validate
from nextblock.decoding.options import MODES, DecodingConfig
from nextblock.decoding.request import CallOptions
from nextblock.measure.bench.prompts import parse_variant
from nextblock.tasks import get_task

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "src" / "nextblock"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
FENCE = re.compile(r"^```([\w{}-]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def prose(page: Path) -> str:
    """The page without fenced blocks and HTML comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)


def lines(page: Path, program: str) -> list[list[str]]:
    """Arguments of every call of `program` in shell blocks and in code spans."""
    shell = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    found = []
    for line in [*shell, *spans]:
        if re.match(rf"(\.venv/bin/)?{program}( |$)", line):
            plain = re.sub(r"\$'([^']*)'", lambda text: shlex.quote(text[1].replace("\\n", "\n")), line)
            found.append(shlex.split(plain, comments=True)[1:])
    return found


def call_id(value: object) -> str | None:
    return " ".join(value)[:70] if isinstance(value, list) else name(value) if isinstance(value, Path) else None


def script(stem: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(stem, ROOT / "docs" / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CALLS = [(page, call) for page in PAGES for call in lines(page, "nextblock")]


def test_the_configuration_page_is_what_its_script_prints():
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    again = "python docs/make_configuration.py > docs/configuration.md"
    assert committed == script("make_configuration").page(), f"out of date; run: {again}"


def test_the_page_of_experiments_is_made_from_their_figures():
    committed = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert committed == script("make_experiments").page(), "out of date; run: python docs/make_experiments.py"


def test_the_mask_picture_is_what_its_script_draws():
    committed = (ROOT / "docs" / "mask.svg").read_text(encoding="utf-8")
    assert committed == script("draw_mask").draw(), "out of date; run: python docs/draw_mask.py > docs/mask.svg"


def test_every_command_is_in_the_readme():
    listed = {call[0] for page, call in CALLS if page == ROOT / "README.md"}
    assert listed >= set(COMMANDS)


def test_the_architecture_page_has_a_line_for_each_file():
    named, folders = set(), [PACKAGE]
    for line in blocks(ARCHITECTURE, "text")[0].splitlines()[1:]:
        level = (len(line) - len(line.lstrip())) // 2
        path = folders[level - 1] / line.split()[0]
        folders[level:] = [path]
        assert len(line.split()) > 1, f"{path.name}: what is it?"
        named |= {path} - {path if line.split()[0].endswith("/") else None}
    there = {
        path
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".html", ".css", ".js") and "assets" not in path.parts
    }
    # Of a package's own file its folder's line tells.
    assert named == {path for path in there if path.name != "__init__.py" or path.parent == PACKAGE}


def test_the_architecture_page_names_functions_that_exist():
    packages = "|".join(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    spans = set(re.findall(rf"`((?:{packages})(?:\.\w+)+)`", ARCHITECTURE.read_text(encoding="utf-8")))
    assert len(spans) > 30
    for span in spans:
        pkgutil.resolve_name(f"nextblock.{span}")


@pytest.mark.parametrize(("page", "call"), CALLS, ids=call_id)
def test_every_command_line_parses(page, call):
    command, arguments = call[0], call[1:]
    assert command in COMMANDS
    parser = COMMANDS[command]
    while arguments and (below := getattr(parser, "commands", None)):  # `bench decode`
        assert arguments[0] in below
        parser, arguments = below[arguments[0]], arguments[1:]
    if not arguments:  # the command's name alone, in running text
        return
    context = parser.make_context(command, list(arguments))
    given = context.params
    if command == "adapt":
        load_config(base(page, given["config"]), parse_overrides(context.args))
    elif command == "generate":
        validate(DecodingConfig, decoding_options(given))
    elif command == "evaluate":
        get_task(given["task"] or "word_problems")
        assert set(given["mode"] or ()) <= set(MODES)
        assert all(value == "none" or 0 < float(value) <= 1 for value in given["threshold"] or ())
    for text in given.get("variant") or ():
        parse_variant(text)


def base(page: Path, config: str) -> Any:
    """A preset's file, or the configuration that the page itself shows."""
    try:
        return preset(config)
    except UsageError:
        return next(values for values in map(yaml.safe_load, blocks(page, "yaml")) if "data" in values)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_make_target_exists(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for call in lines(page, "make"):
        assert {word for word in call if "=" not in word} <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_source_file_named_exists(page):
    named = re.findall(r"`((?:\w+/)+\w+\.(?:py|md|html))`", prose(page))
    assert [path for path in named if not (ROOT / path).exists() and not (PACKAGE / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_resolves(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_python_block_compiles_and_uses_names_that_exist(page):
    for source in blocks(page, "python"):
        tree = ast.parse(source)
        compile(tree, name(page), "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nextblock"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = {"nb": nb, "lm": nb.BlockDiffusionLM}.get(node.value.id)
                fields = getattr(owner, "__dataclass_fields__", {})
                assert owner is None or hasattr(owner, node.attr) or node.attr in fields, ast.unparse(node)
            if isinstance(node, ast.Call) and re.fullmatch(r"lm\.(generate|stream\w*)", ast.unparse(node.func)):
                assert {str(word.arg) for word in node.keywords} <= set(CallOptions.model_fields)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_configuration_shown_is_valid(page):
    for source in blocks(page, "yaml"):
        load_config(yaml.safe_load(source))
    for source in blocks(page, "json"):
        json.loads(source)


def test_the_example_of_the_docs_is_answered_right_by_the_shipped_models():
    shown = {text for _, call in CALLS for text in call if text.startswith("Q: ")}
    assert len(shown) == 1
    prompt = shown.pop()
    calls: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
        ({"path": "tiny-ar"}, [{"mode": "ar"}]),
        ({"path": "tiny-ar", "draft_adapter": "tiny-draft"}, [{"mode": "speculative"}]),
        ({"path": "tiny-bd"}, [{}, *({"mode": mode} for mode in MODES)]),
    ]
    for model, options in calls:
        lm = nb.load(**model)
        for option in options:
            text = lm.generate(prompt, max_new_tokens=96, **option).texts[0]
            assert text == " 8 * 7 = 56. 56 - 13 = 43. The answer is 43."
