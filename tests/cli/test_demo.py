"""`trl-refplug demo`, from the command to the files that it writes."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests import tiny
from tests.cli.processes import run_here, running
from trl_refplug.cli.main import app
from trl_refplug.errors import RefPlugError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved(tmp_path_factory.mktemp("models"), "llama")


def run_demo(directory: Path, model: str, *arguments: str, steps: int = 8) -> "subprocess.CompletedProcess[str]":
    output = ("--output-dir", str(directory))
    return run_here("demo", "--model", model, "--steps", str(steps), *output, *arguments, COLUMNS="120")


def results(directory: Path) -> Any:
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))


def test_everything_it_promises(model: str, tmp_path: Path) -> None:
    completed = run_demo(tmp_path / "out", model)
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    for shown in ("loss", "reward margin", "held-out accuracy", "step time", "reference's share", "peak memory"):
        assert shown in completed.stdout
    assert "provider 'adapter'" in completed.stdout  # `auto` selects it for LoRA
    assert "8/8" in completed.stdout
    assert str(tmp_path / "out") in completed.stdout
    assert len(completed.stdout.splitlines()) < 30

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "curves.png", "results.json"]
    found = results(tmp_path / "out")
    assert [step["step"] for step in found["steps"]] == list(range(1, 9))
    assert found["steps"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["steps"][0]["margin"] == pytest.approx(0, abs=1e-5)
    assert found["steps"][-1]["loss"] < 0.6
    assert found["heldout_margin"] > 0.1
    assert 0 < found["reference_share"] < 1
    assert 1e8 < found["peak_memory"] < 1e11
    assert any(sample["before"] != sample["after"] for sample in found["samples"])

    # The prompts are answered together, and each answer is the same as if its prompt were alone.
    policy, tokenizer = tiny.model(), tiny.tokenizer()
    for sample in found["samples"]:
        chat = [{"role": "user", "content": sample["prompt"]}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = policy.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert sample["before"].startswith(tokenizer.decode(answer[:4], skip_special_tokens=True).strip())
        assert sample["before"]

    import matplotlib.image
    from peft import PeftModel

    picture = matplotlib.image.imread(tmp_path / "out" / "curves.png")
    assert picture.shape[1] > 1000
    assert picture.std() > 0.05  # not blank
    PeftModel.from_pretrained(tiny.model(), tmp_path / "out" / "adapter")


def test_providers_agree(model: str, tmp_path: Path) -> None:
    """The same run gives the same losses with either provider. The results of the earlier run are replaced."""
    first = run_demo(tmp_path, model, "--ref-provider", "adapter", "--seed", "3", steps=3)
    adapter = results(tmp_path)
    second = run_demo(
        tmp_path,
        model,
        "--ref-provider",
        "frozen",
        "--ref-provider-kwargs",
        '{"device": "cpu"}',
        "--seed",
        "3",
        steps=3,
    )
    frozen = results(tmp_path)
    assert (first.returncode, second.returncode) == (0, 0)
    assert (adapter["provider"], frozen["provider"]) == ("adapter", "frozen")
    losses = [step["loss"] for step in frozen["steps"]]
    assert [step["loss"] for step in adapter["steps"]] == pytest.approx(losses, abs=1e-6)
    assert frozen["settings"]["ref_provider_kwargs"] == '{"device": "cpu"}'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ref-provider", "frosen"], "Did you mean 'frozen'?"),
        (["--ref-provider", "frozen", "--ref-provider-kwargs", '{"modle": "x"}'], "'modle'"),
        (["--ref-provider-kwargs", "{"], "not valid JSON"),
    ],
)
def test_reference_flags_are_checked_before_anything_else(arguments: list[str], message: str, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(
        app, ["demo", "--model", "no/model", "--output-dir", str(tmp_path / "out"), *arguments]
    )
    assert isinstance(outcome.exception, RefPlugError)
    assert message in str(outcome.exception)
    assert not (tmp_path / "out").exists()


def test_unwritable_output(model: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = CliRunner().invoke(app, ["demo", "--model", model, "--output-dir", str(tmp_path / "file")])
    assert isinstance(outcome.exception, RefPlugError)
    assert "--output-dir" in str(outcome.exception)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupted_run_leaves_the_earlier_results(model: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("earlier")
    arguments = ["--model", model, "--steps", "100000", "--output-dir", str(tmp_path)]
    began = lambda: list(tmp_path.glob(".unfinished-*"))  # noqa: E731
    with running("-m", "trl_refplug", "demo", *arguments, until=began) as process:
        time.sleep(2)  # by then it is loading or training
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in stdout
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "earlier"


@pytest.mark.realmodel
def test_learns_to_be_concise(tmp_path: Path) -> None:
    """The default run on SmolLM2, which is downloaded if it is not in the user's cache."""
    started = time.monotonic()
    completed = run_here("demo", "--output-dir", str(tmp_path))
    assert completed.returncode == 0, completed.stderr
    found = results(tmp_path)
    assert found["steps"][0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert found["heldout_accuracy"] >= 0.9
    assert found["heldout_margin"] > 1
    assert all(len(sample["before"].split()) > 5 for sample in found["samples"])
    print(f"{time.monotonic() - started:.0f} s in all, {found['step_seconds']:.2f} s a step")
