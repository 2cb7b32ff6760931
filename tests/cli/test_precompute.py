"""`trl-refplug precompute`, a training command that scores and does not train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.processes import run_here
from tests.trainers import two_ranks
from trl_refplug.cli import launched
from trl_refplug.cli.tasks import Precompute
from trl_refplug.store import summarize, verify
from trl_refplug.testing.ranks import launch


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def flags(tmp_path: Path, *more: str) -> list[str]:
    data = tmp_path / "data.jsonl"
    if not data.exists():
        tiny.preference_data().to_json(data)
    options = json.dumps({"path": str(tmp_path / "store")})
    return [
        *("--model_name_or_path", tiny.saved(tmp_path), "--dataset_name", str(data)),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "--bf16", "false"),
        *("--report_to", "none", "--disable_tqdm", "true", "--ref_provider_kwargs", options, *more),
    ]


def test_fills_and_does_not_train(tmp_path: Path) -> None:
    done = run_here("precompute", "dpo", *flags(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"All rows of this run are in {tmp_path / 'store'}." in done.stdout
    assert summarize(tmp_path / "store").rows == 24
    assert not list((tmp_path / "out").glob("**/*.safetensors"))
    # The training command finds every row, also with settings that do not change the reference, such as LoRA.
    options = json.dumps({"path": str(tmp_path / "store"), "fill": "never"})
    training = [*flags(tmp_path, "--ref_provider", "cached", "--use_peft"), "--ref_provider_kwargs", options]
    launched.train("dpo", training)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_again_scores_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launched.train("dpo", flags(tmp_path), Precompute())
    shards = sorted((tmp_path / "store").iterdir())
    launched.train("dpo", flags(tmp_path), Precompute())
    assert sorted((tmp_path / "store").iterdir()) == shards
    assert capsys.readouterr().out.count("All rows of this run are in") == 2


def check_shared(store: Path) -> None:
    report = verify(store)
    assert (report.rows, report.duplicates) == (300, 0)  # each rank has scored its own part


def test_two_processes_of_one_launch(tmp_path: Path) -> None:
    """torchrun starts them, because `accelerate launch` starts only one process on a machine without accelerators."""
    tiny.preference_data(150).to_json(tmp_path / "data.jsonl")  # ranks divide a data set in blocks of 64 rows
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", launched.__file__, Precompute().encode(), "dpo"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [*command, *flags(tmp_path, "--ddp_backend", "gloo")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("All rows of this run are in") == 1
    check_shared(tmp_path / "store")


def test_a_policy_sharded_over_two_processes(tmp_path: Path) -> None:
    """Two ranks with half of the weights each score the rows. A run that has all weights then finds them."""
    tiny.preference_data(150).to_json(tmp_path / "data.jsonl")
    settings = tmp_path / "fsdp.json"
    settings.write_text(json.dumps(two_ranks.FSDP["fsdp_config"]))
    sharded = ("--ddp_backend", "gloo", "--fsdp", "--fsdp_config", str(settings))
    launch(two_ranks.precompute, flags(tmp_path, *sharded))
    check_shared(tmp_path / "store")
    options = json.dumps({"path": str(tmp_path / "store"), "fill": "never"})
    launched.train("dpo", [*flags(tmp_path), "--ref_provider", "cached", "--ref_provider_kwargs", options])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a method and its arguments"),
        (["dop"], "Did you mean 'dpo'"),
        (
            ["dpo", "--ref_provider", "frozen", "--output_dir", "x", "--use_cpu", "--bf16", "false"],
            '{"source": "frozen"}',
        ),
    ],
)
def test_mistakes_are_refused(arguments: list[str], message: str) -> None:
    done = run_here("precompute", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
