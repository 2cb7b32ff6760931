"""`trl-refplug compare`, from the command to the files that it writes."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from tests import tiny
from tests.cli.processes import run_here, running
from trl_refplug.cli.main import app
from trl_refplug.errors import RefPlugError


EMA = 'ema={"sync_steps": 2}'
REFUSED = 'cached={"fill": "never"}'  # the store is empty, which the run finds when it sets up the provider


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved(tmp_path_factory.mktemp("models"), "llama")


def run_compare(output: Path, model: str, *providers: str) -> "subprocess.CompletedProcess[str]":
    flags = [flag for provider in providers for flag in ("--provider", provider)]
    return run_here("compare", "--model", model, "--steps", "5", "--output-dir", str(output), *flags, COLUMNS="120")


@pytest.fixture(scope="module")
def compared(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A comparison of three providers that finish and one that cannot."""
    output = tmp_path_factory.mktemp("compared") / "out"
    return output, run_compare(output, model, "adapter", REFUSED, "cached", EMA)


def results(output: Path) -> Any:
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def test_a_provider_that_fails_is_named_and_the_others_are_compared(compared: tuple[Path, Any]) -> None:
    output, completed = compared
    assert completed.returncode == 2
    assert completed.stderr == ""
    failure = completed.stdout.splitlines()[-1]
    assert failure.startswith("cached (fill=never) failed: ")
    log = Path(failure[failure.rindex("(") + 1 : -1])
    assert "Traceback" in log.read_text()
    assert [run["contender"]["name"] for run in results(output)] == ["adapter", "cached", "ema"]


def test_table_pictures_and_figures(compared: tuple[Path, Any]) -> None:
    output, completed = compared
    assert sorted(path.name for path in output.iterdir()) == [
        "compare.md", "costs.png", "curves.png", "results.json", "runs",
    ]  # fmt: skip
    table = (output / "compare.md").read_text(encoding="utf-8")
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == "| | adapter | cached | ema (sync_steps=2) |"
    assert {line.count("|") for line in lines} == {5}
    for title in ("loss", "reward margin", "step, median", "peak memory", "on disk", "reference differs by"):
        assert f"| {title} |" in table
        assert title in completed.stdout

    import matplotlib.image

    for name in ("curves.png", "costs.png"):
        picture = matplotlib.image.imread(output / name)
        assert picture.shape[1] > 1000
        assert picture.std() > 0.05  # not blank


def test_what_is_measured(compared: tuple[Path, Any]) -> None:
    output, _ = compared
    adapter, cached, ema = results(output)
    for run in (adapter, cached, ema):
        assert [step["step"] for step in run["steps"]] == [1, 2, 3, 4, 5]
        assert run["steps"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert all(0 <= step["reference_seconds"] < step["seconds"] for step in run["steps"])
        assert 1e8 < run["peak_memory"] < 1e11
        assert run["wire_bytes"] is None
    store = output / "runs" / "cached" / "store"
    assert cached["disk_bytes"] == sum(path.stat().st_size for path in store.iterdir()) > 0
    assert adapter["disk_bytes"] is None
    # Stored values were scored in other batches, so they agree, though not in every bit.
    assert 0 < cached["agreement"]["log_probs"] < 1e-3
    assert cached["agreement"]["loss"] < 1e-3
    # Until its first sync, in the first two of the batches compared, the moving reference equals the fixed one.
    assert ema["moving"]
    assert not adapter["moving"]
    assert [step["loss"] for step in ema["steps"][:2]] == [step["loss"] for step in adapter["steps"][:2]]
    assert ema["agreement"]["log_probs"] > 1e-3
    assert ema["agreement"]["loss"] > 1e-3


def test_finished_runs_are_kept(compared: tuple[Path, Any], model: str, tmp_path: Path) -> None:
    output = shutil.copytree(compared[0], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/*")}
    completed = run_compare(output, model, "cached", "adapter")
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("kept from an earlier run") == 2
    assert {path: path.stat().st_mtime_ns for path in output.glob("runs/*/*")} == before
    assert [run["contender"]["name"] for run in results(output)] == ["cached", "adapter"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "frosen"], "Did you mean 'frozen'?"),
        (["--provider", 'frozen={"modle": "x"}'], "'modle'"),
        (["--provider", "frozen={"], "not valid JSON"),
        (["--provider", "frozen", "--provider", "frozen={}"], "given twice"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--data", __file__], "not JSON"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(arguments: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    outcome = CliRunner().invoke(app, ["compare", "--model", "no/model", "--output-dir", str(output), *arguments])
    assert isinstance(outcome.exception, RefPlugError), outcome.output
    assert message in str(outcome.exception)
    assert not output.exists()


def test_unknown_model(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["compare", "--model", str(tmp_path / "no"), "--output-dir", str(tmp_path)])
    assert isinstance(outcome.exception, RefPlugError)
    assert "--model" in str(outcome.exception)


@pytest.fixture
def endless(model: str, tmp_path: Path) -> Any:
    """A comparison with a run that is training and would last for hours, and the child process that trains."""
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "the cat", "chosen": " sat on a mat", "rejected": " sang to nobody"}
    pairs.write_text(f"{json.dumps(row)}\n" * 4)
    flags = ["--provider", "adapter", "--steps", "1000000", "--output-dir", str(tmp_path / "out")]
    command = ["compare", "--model", model, "--data", str(pairs), *flags]
    began = (tmp_path / "out" / "runs" / "adapter" / "log.txt").exists
    with running("-m", "trl_refplug", *command, until=began, COLUMNS="120") as process:
        time.sleep(1)  # by then it is loading or training
        yield process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupted(endless: Any, tmp_path: Path) -> None:
    process, workers = endless
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted. Finished runs are kept in" in stdout
    assert "Traceback" not in stderr
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert all(
        worker.status() == psutil.STATUS_ZOMBIE for worker in alive
    )  # zombies have ended too, but nobody has asked for their exit status
    assert not list(tmp_path.glob("out/runs/*/run.json"))


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_killed_run_is_a_failed_one(endless: Any) -> None:
    process, workers = endless
    next(worker for worker in workers if "spawn_main" in " ".join(worker.cmdline())).kill()
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "adapter failed: its process was killed, most likely because memory ran out" in stdout
