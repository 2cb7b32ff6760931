"""
The Python code of every page runs, from top to bottom, in a directory of its own.

What a page takes for granted (`model`, `dataset`, the public names) is there, and names of things that tests do not
have are replaced, in the text of the code, by tiny ones: see `SUBSTITUTES`. Nothing else is changed.
"""

from __future__ import annotations

import linecache
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_refplug
from tests import tiny
from tests.docs.pages import DOCS, PAGES, ROOT, code_blocks, name_of


SUBSTITUTES = {
    "Qwen/Qwen3-0.6B": "{model}",  # a model of the hub: a random one of 30,000 parameters
    "cuda:1": "cpu",
    "Config(..., ": 'Config(output_dir="out", ',
}


def given(page: Path) -> dict[str, Any]:
    """What the code of a page may use without saying where it comes from."""
    names = {name: getattr(trl_refplug, name) for name in trl_refplug.__all__ if name.startswith("RefPlug")}
    names |= {"model": tiny.model(), "tokenizer": tiny.tokenizer(), "dataset": tiny.preference_data(4)}
    return names | SCENES.get(name_of(page), dict)()


def scoring_scene() -> dict[str, Any]:
    """A batch, and rows of prompt and completion."""
    ids = torch.arange(20, 40).reshape(2, 10)
    batch = trl_refplug.ReferenceBatch(ids, torch.ones_like(ids), ids)
    return {"batch": batch, "data": [([20, 21, 22], [23, 24]), ([20, 21], [25])]}


def store_scene() -> dict[str, Any]:
    """Rows, as token ids and scored positions, and a way to score them."""
    import numpy as np

    rows = [(np.arange(5 + row), np.array([2, 3])) for row in range(3)]
    return {"rows": rows, "score": lambda missing: [np.full(2, -1.5, np.float32) for _ in missing]}


SCENES = {"docs/scoring.md": scoring_scene, "docs/store.md": store_scene}

WITH_CODE = [page for page in PAGES if code_blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_runs(page: Path, tmp_path: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny.saved(tmp_path_factory.getbasetemp(), "llama")
    namespace = {"__name__": "a_page"} | given(page)
    for line, code in code_blocks(page, "python"):
        for name, substitute in SUBSTITUTES.items():
            code = code.replace(name, substitute.format(model=model))
        # Lines as in the page, also in tracebacks.
        code = "\n" * (line - 1) + code
        linecache.cache[str(page)] = (len(code), None, page.read_text(encoding="utf-8").splitlines(True), str(page))
        exec(compile(code, str(page), "exec"), namespace)


def test_pages_with_code_are_found() -> None:
    assert {ROOT / "README.md", DOCS / "quickstart.md", DOCS / "providers" / "ema.md"} <= set(WITH_CODE)
