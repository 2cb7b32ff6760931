"""Every relative link of every page leads to a file and, on GitHub as on the site, to a heading."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, name_of, prose


LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """GitHub's ids of headings: lower case, no punctuation, hyphens for spaces."""
    headings = HEADING.findall(prose(page))
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link} leads nowhere"
        assert ROOT in target.parents, f"{name_of(page)}: {link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)}: {link}: {name_of(target)} has no such heading"
