"""The blocks of a Markdown page that its tests run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>file|run)(?:: (?P<value>[^\n]+?))? -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """
    A fenced block. The HTML comment in the line above marks it: `file: PATH` (write it there), `run` or `run: fails`.

    Args:
        language (`str`): After the opening fence.
        code (`str`): Its text.
        mark (`str`): `"file"`, `"run"` or empty.
        value (`str`): What follows the mark.
    """

    language: str
    code: str
    mark: str
    value: str


def blocks(page: str) -> Iterator[Block]:
    """All fenced blocks of a page in docs/, in order."""
    for found in _BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")):
        yield Block(found["language"], found["code"], found["mark"] or "", found["value"] or "")
