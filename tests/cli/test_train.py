"""`trl-refplug dpo|kto|grpo|rloo`, which run TRL's scripts with the reference from a provider."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from typer.testing import CliRunner

from tests import tiny
from tests.cli.processes import run_here
from trl_refplug.arguments import ReferenceArguments
from trl_refplug.cli import launched
from trl_refplug.cli.main import app
from trl_refplug.errors import RefPlugError, SeamError


pytestmark = pytest.mark.usefixtures("own_datasets_cache")
METHODS = ["dpo", "kto", "grpo", "rloo"]
DATA = {
    "dpo": tiny.preference_data,
    "kto": tiny.unpaired_data,
    "grpo": tiny.prompt_data,
    "rloo": tiny.prompt_data,
}
ONLINE = ["--beta", "0.1", "--num_generations", "2", "--max_completion_length", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved(tmp_path_factory.mktemp("models"), "qwen2")


def write(data: Dataset, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    getattr(data, {".csv": "to_csv", ".parquet": "to_parquet"}.get(path.suffix, "to_json"))(path)
    return path


def flags(model: str, data: Path | str, output: Path) -> list[str]:
    return [
        *("--model_name_or_path", model, "--dataset_name", str(data), "--output_dir", str(output)),
        *("--max_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--use_cpu"),
        *("--report_to", "none", "--disable_tqdm", "true"),
    ]


def logged(output: Path) -> list[dict[str, Any]]:
    """The training logs of the steps, without the summary."""
    history = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def trained_with(output: Path) -> str:
    """The provider that the checkpoint names. TRL's own trainer does not write it."""
    [saved] = (output / "checkpoint-2" / "refplug").glob("*.json")
    return str(json.loads(saved.read_text())["identity"]["provider"])


@pytest.mark.parametrize("method", METHODS)
def test_trains_with_the_provider(method: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(DATA[method](), tmp_path / "data.jsonl")
    arguments = flags(model, data, tmp_path / "out")
    if method in ("grpo", "rloo"):
        (tmp_path / "brevity.py").write_text(
            "def reward(completions, **_):\n    return [-len(c) for c in completions]\n"
        )
        monkeypatch.chdir(tmp_path)  # TRL's scripts look for reward functions in the working directory
        arguments += [*ONLINE, "--reward_funcs", "brevity.reward"]
    launched.train(method, [*arguments, "--ref_provider", "frozen", "--use_peft", "--lora_r", "4"])
    assert trained_with(tmp_path / "out") == "frozen"
    assert all(entry["ref/time"] > 0 for entry in logged(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_same_as_trls_own_script(model: str, tmp_path: Path) -> None:
    import trl.scripts.dpo

    data = write(tiny.preference_data(), tmp_path / "data" / "train.jsonl").parent
    arguments = [*flags(model, data, tmp_path / "ours"), "--bf16", "false"]
    launched.train("dpo", arguments)
    arguments[arguments.index(str(tmp_path / "ours"))] = str(tmp_path / "theirs")
    trl.scripts.dpo.main(*trl.scripts.dpo.make_parser().parse_args_and_config(arguments))
    ours, theirs = logged(tmp_path / "ours"), logged(tmp_path / "theirs")
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert [entry[key] for entry in ours] == [entry[key] for entry in theirs]
    assert "ref/time" in ours[0]
    assert "ref/time" not in theirs[0]


@pytest.mark.parametrize("ending", ["json", "parquet", "csv"])
def test_local_files(ending: str, model: str, tmp_path: Path) -> None:
    data = write(tiny.preference_data(), tmp_path / f"data.{ending}")
    launched.train("dpo", flags(model, data, tmp_path / "out"))
    assert len(logged(tmp_path / "out")) == 2


def test_directory_with_an_evaluation_split(model: str, tmp_path: Path) -> None:
    write(tiny.preference_data(), tmp_path / "data" / "train.jsonl")
    write(tiny.preference_data(4), tmp_path / "data" / "test.jsonl")
    launched.train(
        "dpo", [*flags(model, tmp_path / "data", tmp_path / "out"), "--eval_strategy", "steps", "--eval_steps", "1"]
    )
    history = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_loss" in entry for entry in history) == 2


def test_streamed_file(model: str, tmp_path: Path) -> None:
    data = write(tiny.preference_data(), tmp_path / "data.jsonl")
    launched.train("dpo", [*flags(model, data, tmp_path / "out"), "--dataset_streaming"])
    assert len(logged(tmp_path / "out")) == 2


def test_launched_from_the_command_line(model: str, tmp_path: Path) -> None:
    """The YAML file has flags of all three kinds: TRL's, reference flags, and accelerate's."""
    data = write(tiny.preference_data(), tmp_path / "data.jsonl")
    (tmp_path / "config.yaml").write_text(
        "ref_provider: frozen\nref_provider_kwargs:\n  dtype: float32\nnum_processes: 1\nlearning_rate: 1.0e-3\n"
    )
    (tmp_path / "accelerate.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n"
    )
    completed = run_here(
        "dpo",
        *("--config", str(tmp_path / "config.yaml"), "--accelerate_config", str(tmp_path / "accelerate.yaml")),
        *flags(model, data, tmp_path / "out"),
        *("--mixed_precision", "no"),
    )
    assert completed.returncode == 0, completed.stderr
    assert trained_with(tmp_path / "out") == "frozen"
    assert logged(tmp_path / "out")[0]["learning_rate"] == pytest.approx(1e-3)


@pytest.mark.parametrize("asked", ["0", "1"])
def test_failure_of_the_launched_process(model: str, tmp_path: Path, asked: str) -> None:
    """The process shows its error, with a traceback if the user asked for it. The launcher adds no traceback."""
    data = write(tiny.preference_data(), tmp_path / "data.jsonl")
    arguments = flags(model, data, tmp_path / "out")
    arguments += ["--use_peft", "--ref_provider", "adapter"]
    arguments += ["--ref_provider_kwargs", '{"adapter": "other"}']  # the policy has no adapter of that name
    completed = run_here("dpo", *arguments, TRL_REFPLUG_TRACEBACK=asked)
    assert completed.returncode == 2, completed.stderr
    assert completed.stderr.count("Error:") == 1 + int(asked)  # a traceback ends with the error, too
    assert completed.stderr.count("Traceback") == int(asked)
    assert not (tmp_path / "out" / "checkpoint-2").exists()


def refusal(*arguments: str) -> str:
    """The message with which the command refuses to start."""
    outcome = CliRunner().invoke(app, list(arguments))
    assert isinstance(outcome.exception, RefPlugError), outcome.output
    return str(outcome.exception)


@pytest.fixture(scope="module")
def named(model: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name a model and data that exist."""
    data = write(tiny.preference_data(), tmp_path_factory.mktemp("named") / "data.jsonl")
    return ["--model_name_or_path", model, "--dataset_name", str(data), "--use_cpu", "--reward_funcs", "a.b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ref_provider", "frosen"], "Did you mean 'frozen'?"),
        (["--ref_provider", "frozen", "--ref_provider_kwargs", '{"modle": "x"}'], "'modle'"),
        (["--ref_provider_kwargs", "{"], "not valid JSON"),
        (["--use_peft", "--ref_provider_kwargs", '{"start": "nowhere"}'], "'start'"),
        (["--ref_provder", "frozen"], "Unknown flag --ref_provder. Did you mean '--ref_provider'?"),
        (["--num_proceses", "2"], "Did you mean '--num_processes'?"),
        (["stray"], "'stray'"),
        (["--accelerate_config", "nothing_like_it"], "nothing_like_it"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_mistakes_are_found_before_the_launch(arguments: list[str], message: str, named: list[str]) -> None:
    assert message in refusal("dpo", *arguments, *named[:-2])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_checks_its_reference(method: str, named: list[str]) -> None:
    assert "Did you mean 'frozen'?" in refusal(method, *named, "--ref_provider", "frosen")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "no/data"], "--model_name_or_path"),
        (["--model_name_or_path", "MODEL"], "--dataset_name"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "missing.jsonl"], "there is no such file"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "no/such/data"], "no/such/data: there is no such"),
        (["--model_name_or_path", "./modle", "--dataset_name", "no/data"], "./modle: there is no such directory"),
        (["--model_name_or_path", "MODEL", "--dataset_name", __file__], "expected a file that ends in"),
    ],
)
def test_model_and_data_must_be_named(arguments: list[str], message: str, model: str) -> None:
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    assert message in refusal("dpo", "--use_cpu", *arguments)


def test_a_misspelled_file_is_suggested(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tiny.preference_data(), tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    message = refusal("dpo", "--use_cpu", "--model_name_or_path", model, "--dataset_name", "pairs.jsnl")
    expected = (
        "--dataset_name pairs.jsnl: there is no such file or directory. Did you mean 'pairs.jsonl'? As a name on"
    )
    assert message.startswith(expected)


def test_single_file_has_no_evaluation_split(model: str, tmp_path: Path) -> None:
    data = write(tiny.preference_data(), tmp_path / "data.jsonl")
    arguments = [
        "--use_cpu",
        "--model_name_or_path",
        model,
        "--dataset_name",
        str(data),
        "--eval_strategy",
        "epoch",
    ]
    assert "test.jsonl" in refusal("dpo", *arguments)


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_reference_flags_and_where_the_others_are(method: str) -> None:
    outcome = CliRunner().invoke(app, [method, "--help"])
    assert outcome.exit_code == 0
    assert outcome.stdout.startswith(f"usage: trl-refplug {method} ")
    for flag in fields(ReferenceArguments):
        assert f"--{flag.name} " in outcome.stdout
    assert f"trl-refplug {method} --help-all" in outcome.stdout


@pytest.mark.parametrize("method", METHODS)
def test_help_all_is_trls_with_the_reference_flags(method: str) -> None:
    outcome = CliRunner().invoke(app, [method, "--help-all"])
    assert outcome.exit_code == 0
    assert outcome.stdout.startswith(f"usage: trl-refplug {method} ")
    for flag in (
        "--ref_provider REF_PROVIDER",
        "--ref_check {error,warn,off}",
        "--beta",
        "--lora_r",
        "--dataset_name",
    ):
        assert flag in outcome.stdout


def test_trl_keeps_its_classes() -> None:
    before = (trl.DPOConfig, trl.DPOTrainer)
    with pytest.raises(SystemExit):
        launched.train("dpo", ["--help"])
    assert (trl.DPOConfig, trl.DPOTrainer) == before


def test_changed_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a script took its trainer from elsewhere, it would train without the provider."""
    import trl.scripts.dpo

    def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
        trl.trainer.dpo_trainer.DPOTrainer(args=training_args)

    monkeypatch.setattr(trl.scripts.dpo, "main", main)
    with pytest.raises(SeamError, match="TRL"):
        launched.train("dpo", ["--use_cpu"])
