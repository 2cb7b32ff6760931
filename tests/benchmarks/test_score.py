"""
The speed of scoring, on a real model. Only figures that do not depend on the machine are checked against bounds.

    REFPLUG_MODEL=DIR [REFPLUG_DATA=pairs.jsonl] [REFPLUG_ROWS=24] python -m pytest -m benchmark -s tests/benchmarks
"""

import json
import os

import pytest
from typer.testing import CliRunner

from trl_refplug.cli.bench import app


@pytest.mark.benchmark
@pytest.mark.timeout(24 * 3600)
@pytest.mark.parametrize("shape", ["pairs", "long-prompt", "grpo", "unshared", "long"])
def test_score(shape, tmp_path):
    if "REFPLUG_MODEL" not in os.environ:
        pytest.skip("set REFPLUG_MODEL to a directory with a causal language model")
    arguments = ["--model", os.environ["REFPLUG_MODEL"], "--rows", os.environ.get("REFPLUG_ROWS", "24")]
    if "REFPLUG_DATA" in os.environ:
        arguments += ["--data", os.environ["REFPLUG_DATA"], "--sample"]
    arguments += ["--shape", shape, "--max-length", "4096" if shape == "long" else "1024", "--output", str(tmp_path)]
    outcome = CliRunner().invoke(app, ["score", *arguments], catch_exceptions=False)
    print(outcome.stdout)
    assert outcome.exit_code == 0
    [result] = json.loads((tmp_path / "score.json").read_text())
    for run in result["runs"]:
        assert run["difference"] <= 1e-3
        assert run["memory"] <= run["trl_memory"]
