"""pip installs a third party's package in a fresh environment, and a flag alone selects it in training."""

import json

from tests import tiny
from tests.cli.processes import run_python
from tests.cli.test_plugins import python  # noqa: F401 (the fixture)


def test_trains_by_flag_alone(python, tmp_path):  # noqa: F811
    data = tmp_path / "pairs.jsonl"
    tiny.preference_data().to_json(data)
    arguments = ["--model_name_or_path", tiny.saved(tmp_path), "--dataset_name", str(data)]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "--bf16", "False"]
    arguments += ["--per_device_train_batch_size", "2", "--report_to", "none", "--save_strategy", "steps"]
    reference = ["--ref_provider", "uniform", "--ref_provider_kwargs", '{"scale": 2.0}']
    done = run_python(python, "-m", "trl_refplug", "dpo", *arguments, *reference, TRL_REFPLUG_BLOCK="refplug-twin")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "checkpoint-2" / "refplug" / "reference.json").read_text())
    assert record["provider"] == "uniform"

    # For the broken plugin, its own traceback is shown before anything is loaded.
    broken = run_python(python, "-m", "trl_refplug", "dpo", *arguments, "--ref_provider", "broken")
    assert broken.returncode == 2
    assert "import a_package_nobody_has" in broken.stderr
    assert "ModuleNotFoundError" in broken.stderr
