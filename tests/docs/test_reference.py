"""What the pages say of names, flags, options, messages and tests is what there is."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import trl_refplug
from tests.docs import commands
from tests.docs.markdown import DOCS
from tests.docs.pages import ROOT, prose, table_cells
from trl_refplug import errors, scoring, store, testing
from trl_refplug.cli.main import app
from trl_refplug.plugins import plugin_manager


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


# Python API


@pytest.mark.parametrize("module", [trl_refplug, scoring, store, testing], ids=lambda module: module.__name__)
def test_public_names_are_documented(module: Any) -> None:
    page = read("api.md")
    names = [name for name in module.__all__ if f"::: {module.__name__}.{name}\n" not in page]
    assert [name for name in names if f"`{name}`" not in page] == []


# Commands


def test_commands_are_those_there_are() -> None:
    assert read("commands.md") == commands.page(), "python -m tests.docs.commands"


def test_every_command_is_there() -> None:
    """The page is generated, and a generator that overlooks commands would agree with itself."""
    page = read("commands.md")
    for name in (
        "demo",
        "compare",
        "plugins",
        "bench score",
        "ema export",
        "store info",
        "store verify",
        "dpo",
        "kto",
    ):
        assert f"## trl-refplug {name}\n" in page
    for flag in ("--ref_provider", "--ref-provider-kwargs", "--output-dir", "--tolerance", "--token-budget"):
        assert f"| `{flag}` |" in page


@pytest.mark.parametrize("path", [path for path, command in commands.commands() if command.params], ids=" ".join)
def test_help_says_what_the_page_says(path: tuple[str, ...]) -> None:
    """Typer takes what is in square brackets for markup, and would leave it out of `--help`."""
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "1000"}).stdout
    command = dict(commands.commands())[path]
    missing = [parameter.name for parameter in command.params if parameter.help not in shown]
    assert missing == []


# Providers


@pytest.mark.parametrize("name", [path.stem for path in sorted((DOCS / "providers").glob("*.md"))])
def test_every_option_of_a_provider_is_documented(name: str) -> None:
    options = dataclasses.fields(plugin_manager().provider_class(name).Options)
    documented = {word for row in table_cells(prose(DOCS / "providers" / f"{name}.md")) for word in row[0].split("`")}
    assert {option.name for option in options} <= documented


def test_every_provider_has_a_page() -> None:
    built_in = {name for name, provider in plugin_manager().providers.items() if "." not in provider.plugin.name}
    assert {"frozen", "adapter", "cached", "ema"} <= built_in
    assert {path.stem for path in (DOCS / "providers").glob("*.md")} >= {"frozen", "adapter", "cached", "ema"}


# Troubleshooting


EXCEPTIONS = [
    name
    for name, value in vars(errors).items()
    if inspect.isclass(value) and value.__module__ == errors.__name__ and value is not errors.RefPlugError
]


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_exception_has_a_section(name: str) -> None:
    assert f"\n## {name}\n" in read("troubleshooting.md")


def plain(text: str) -> str:
    """Without Markdown's and Python's ways of quoting."""
    return re.sub(r"[`'\"]", "", text)


def texts_in_source() -> list[str]:
    """Every text of the package, with … for what is filled in."""
    texts = []
    for path in (ROOT / "trl_refplug").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append(plain("".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(plain(node.value))
    return texts


def test_messages_are_those_of_the_package() -> None:
    texts = texts_in_source()
    messages = [row[0] for row in table_cells(read("troubleshooting.md")) if row[0] != "message"]
    assert len(messages) > 30
    unknown = [message for message in messages if not any(plain(message) in text for text in texts)]
    assert unknown == []


# Promises and figures


def test_tests_of_the_promises_exist() -> None:
    rows = [row for row in table_cells(read("promises.md")) if row[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, 10))
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)`(?: \(([^)]*)\))?", row[2])
        assert named, f"promise {row[0]} names no test"
        for file, classes in named:
            path = ROOT / "tests" / file
            assert path.is_file(), file
            for name in re.findall(r"`(\w+)`", classes):
                assert f"\nclass {name}" in path.read_text(encoding="utf-8"), f"{file} has no {name}"


def test_tests_named_elsewhere_exist() -> None:
    for page in DOCS.rglob("*.md"):
        for file in re.findall(r"`(tests/[\w/]+\.py)", page.read_text(encoding="utf-8")):
            assert (ROOT / file).is_file(), f"{page.name}: {file}"


def test_readme_and_benchmarks_show_the_same_figures() -> None:
    def table(path: Path) -> list[list[str]]:
        return [row for row in table_cells(path.read_text(encoding="utf-8")) if len(row) == 5 and "→" not in row[0]]

    readme = [row for row in table(ROOT / "README.md") if row[0]]
    assert len(readme) > 5
    assert [row for row in table(DOCS / "benchmarks.md") if row[0] in {row[0] for row in readme}] == readme
