"""The site builds, strictly: an unresolved link or anchor, or a page that is in no menu, would be an error."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


pytest.importorskip("mkdocs", reason="pip install 'trl-refplug[docs]'")


def test_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr
    assert not re.search("^WARNING", completed.stderr, re.MULTILINE)
    site = tmp_path / "site"
    api = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="trl_refplug.ReferenceProvider.log_probs"' in api
    home = (site / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis.com" not in home  # nothing is fetched from elsewhere
