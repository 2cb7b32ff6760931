"""
Writes docs/commands.md from the commands themselves; the tests compare the two.

    python -m tests.docs.commands
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from trl_refplug.arguments import ReferenceArguments
from trl_refplug.cli.main import app
from trl_refplug.cli.train import COMMAND_SETTINGS


PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
HEAD = """\
# Commands

<!-- Written by `python -m tests.docs.commands`. -->

`trl-refplug COMMAND --help` shows the same.

| exit status | |
|---|---|
| 0 | the command did what was asked, and what it compared agrees |
| 1 | what it compared differs: `check`, `store verify`. `serve`: the GPU was lost |
| 2 | it cannot be done. A mistake is a message of one line or a short list; a defect comes with its traceback |
| 130 | it was interrupted by Ctrl-C |

`TRL_REFPLUG_TRACEBACK=1` shows the traceback of every error, and changes no status.
"""
REFERENCE_FLAGS = """
## Reference flags

The training commands take every flag of TRL's own (`--help-all` lists them), and these, which are fields of the
`RefPlug*Config` classes too:
"""


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words it is called by."""
    command = command or typer.main.get_command(app)
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


def page() -> str:
    """The whole page, with the commands in the panels that `--help` shows."""
    top: Any = typer.main.get_command(app)
    panels = defaultdict(list)
    for path, command in commands(top):
        panels[top.commands[path[0]].rich_help_panel].append(_section(path, command))
    sections = [text for panel, sections in panels.items() for text in (f"## {panel}\n", *sections)]
    return "\n".join([HEAD, *sections, REFERENCE_FLAGS, _flags(), ""])


def _section(path: tuple[str, ...], command: Any) -> str:
    name = f"trl-refplug {' '.join(path)}"
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = [name, *(argument.name.upper() for argument in arguments)]
    if options:
        usage.append("[OPTIONS]")
    if command.context_settings == COMMAND_SETTINGS["context_settings"]:  # passes everything on to TRL
        usage.append("[METHOD] [TRL'S FLAGS]" if path == ("precompute",) else "[TRL'S FLAGS]")
    lines = [f"### {name}", "", "```text", " ".join(usage), "```", "", inspect.cleandoc(command.help)]
    if arguments or options:
        lines += ["", "| | default | |", "|---|---|---|"]
    lines += [f"| `{argument.name.upper()}` | | {argument.help} |" for argument in arguments]
    lines += [f"| `{option.opts[0]}` | {_default(option.default)} | {option.help} |" for option in options]
    return "\n".join([*lines, ""])


def _default(value: Any) -> str:
    return "" if value is None or value is False else f"`{getattr(value, 'value', value)}`"


def _flags() -> str:
    rows = [
        f"| `--{field.name}` | {_default(field.default)} | {field.metadata['help']} |"
        for field in dataclasses.fields(ReferenceArguments)
    ]
    return "\n".join(["| | default | |", "|---|---|---|", *rows])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
