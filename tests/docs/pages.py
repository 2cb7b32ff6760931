"""The pages, and what is in them beside code."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.markdown import DOCS


ROOT = DOCS.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    """For test ids."""
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def table_cells(text: str) -> list[list[str]]:
    """The cells of every row of every table, without headings' rulers."""
    rows = [line.strip().strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip(" |") for cell in row] for row in rows if not set("".join(row)) <= set("-| ")]
