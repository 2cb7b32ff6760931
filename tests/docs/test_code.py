"""
The Python code of every page runs, from top to bottom, in a directory of its own.

What a page takes for granted (`model`, `dataset`, the public names) is there, and names of things that tests do not
have are replaced, in the text of the code, by tiny ones: see `SUBSTITUTES`. Nothing else is changed.
"""

from __future__ import annotations

import linecache
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_refplug
from tests import tiny
from tests.docs.markdown import DOCS, blocks
from tests.docs.pages import PAGES, ROOT, name_of


SUBSTITUTES = {
    "Qwen/Qwen3-0.6B": "{model}",  # a model of the hub: a random one of 30,000 parameters
    "cuda:1": "cpu",
    "Config(..., ": 'Config(output_dir="out", ',
    'output_dir="out"': 'output_dir="out", use_cpu=True, bf16=False',
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


def python_code(page: Path) -> list[str]:
    """The page's blocks of Python."""
    return [block.code for block in blocks(os.path.relpath(page, DOCS)) if block.language == "python"]


ELSEWHERE = {DOCS / "writing-a-provider.md"}  # test_writing_a_provider.py runs all of it, in an empty environment
WITH_CODE = [page for page in PAGES if python_code(page) and page not in ELSEWHERE]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_runs(page: Path, tmp_path: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny.saved(tmp_path_factory.getbasetemp(), "llama")
    namespace = {"__name__": "a_page"} | given(page)
    for number, code in enumerate(python_code(page), 1):
        for name, substitute in SUBSTITUTES.items():
            code = code.replace(name, substitute.format(model=model))
        file = f"{name_of(page)}, Python block {number}"
        linecache.cache[file] = (len(code), None, code.splitlines(True), file)  # for tracebacks
        exec(compile(code, file, "exec"), namespace)


def test_pages_with_code_are_found() -> None:
    assert {ROOT / "README.md", DOCS / "quickstart.md", DOCS / "providers" / "ema.md"} <= set(WITH_CODE)
