"""pip installs the example plugin in a fresh environment. Its tests pass, and a flag alone selects it in training."""

import json

import pytest

from tests import tiny
from tests.cli.processes import ROOT, environment_with, run_python


EXAMPLE = ROOT / "docs" / "example-plugin"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return environment_with(EXAMPLE, directory=tmp_path_factory.mktemp("environment"))


@pytest.mark.parametrize("tests", ["TestMixture", "not TestMixture and not two_ranks"])
def test_passes_its_own_tests(python, tests):
    arguments = ["-q", "-p", "no:cacheprovider", str(EXAMPLE), "-c", str(EXAMPLE / "pyproject.toml"), "-k", tests]
    done = run_python(python, "-m", "pytest", *arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout


def test_trains_by_flag_alone(python, tmp_path):
    data = tmp_path / "pairs.jsonl"
    tiny.preference_data().to_json(data)
    parts = [
        {"provider": "frozen", "weight": 0.75},
        {"provider": "frozen", "weight": 0.25, "kwargs": {"dtype": "bfloat16"}},
    ]
    arguments = ["--model_name_or_path", tiny.saved(tmp_path), "--dataset_name", str(data)]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "--bf16", "False"]
    arguments += ["--per_device_train_batch_size", "2", "--report_to", "none", "--save_strategy", "steps"]
    arguments += ["--ref_provider", "mixture", "--ref_provider_kwargs", json.dumps({"parts": parts})]
    done = run_python(python, "-m", "trl_refplug", "dpo", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "checkpoint-2" / "refplug" / "reference.json").read_text())
    assert record["provider"] == "mixture"
    assert [part["provider"] for part in record["identity"]["parts"]] == ["frozen", "frozen"]
    assert sorted(record["identity"]["details"]["weights"]) == [0.25, 0.75]
