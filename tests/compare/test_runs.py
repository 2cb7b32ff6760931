"""Records of runs, how two of them are compared, and runs in a process of their own."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from trl_refplug.compare import child_process
from trl_refplug.compare.child_process import finished_run, run_in_child
from trl_refplug.compare.comparison import as_markdown, compare_runs
from trl_refplug.compare.job import Job, Run, Step
from trl_refplug.compare.provider_choice import ProviderChoice
from trl_refplug.compare.training import REFERENCE


LABELS = np.array([[-100, 5, 6], [-100, -100, 7]])


def made(folder: Path, losses: list[float], log_probs: list[float], labels: np.ndarray = LABELS, **facts: int) -> Run:
    """Write a finished run of one batch to `folder`."""
    folder.mkdir()
    steps = [Step(number, loss, 0.5, 1.0, 2.0, 0.5) for number, loss in enumerate(losses, 1)]
    job = {"model": "m", "data": None, "steps": len(losses), "seed": 0, "threads": 2, **facts}
    run = Run(ProviderChoice(folder.name), job, "reference", False, "cpu", steps, 3.0, 2**30, None, 5_000_000)
    run.save(folder)
    values = np.array(log_probs, np.float32).reshape(2, 2)
    np.savez(folder / REFERENCE, labels_0=labels, log_probs_0=values)
    return run


def test_agreement_is_the_largest_difference(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    found = compare_runs(made(one, [0.7, 0.5], [-1, -2, 0, -3]), one, made(two, [0.7, 0.25], [-1, -2.5, 0, -3]), two)
    assert (found.log_probs, found.loss) == (0.5, 0.25)
    found = compare_runs(Run.load(one), one, Run.load(one), one)  # type: ignore[arg-type]
    assert (found.log_probs, found.loss) == (0, 0)


def test_other_rows_are_not_compared(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    runs = [made(one, [0.7], [0, 0, 0, 0]), made(two, [0.7], [0, 0, 0, 0], LABELS + 1)]
    found = compare_runs(runs[0], one, runs[1], two)
    assert found.log_probs is None
    assert "| reference differs by | - | other rows |" in as_markdown(runs, [found])
    assert "| on the wire | 5.0 MB | 5.0 MB |" in as_markdown(runs, [found])
    assert "on disk" not in as_markdown(runs, [found])


def test_a_finished_run_counts_for_the_same_job_only(tmp_path: Path) -> None:
    run = made(tmp_path / "adapter", [0.7], [0, 0, 0, 0])
    assert finished_run(run.facts, ProviderChoice("adapter"), tmp_path / "adapter") == run
    assert finished_run({**run.facts, "seed": 1}, ProviderChoice("adapter"), tmp_path / "adapter") is None
    assert finished_run(run.facts, ProviderChoice("adapter", '{"start": "base"}'), tmp_path / "adapter") is None
    assert finished_run(run.facts, ProviderChoice("adapter"), tmp_path / "nowhere") is None
    (tmp_path / "adapter" / "run.json").write_text("{")
    assert finished_run(run.facts, ProviderChoice("adapter"), tmp_path / "adapter") is None


def test_facts_of_a_job_change_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}")
    job = Job(str(tmp_path), str(data), 1, 0, 256)
    before = job.facts()
    assert (
        json.loads(json.dumps(before)) == before == job.facts()
    )  # they are the same after they were written to disk and read
    data.write_text("{ }")
    assert job.facts() != before


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_as_a_run_begins(tmp_path: Path) -> None:
    """A terminal sends the signal to both processes. The new one ignores it, and its parent ends it."""
    survived = []

    def interrupt() -> None:
        found: list[psutil.Process] = []
        while not found:
            found = [each for each in psutil.Process().children() if "spawn_main" in " ".join(each.cmdline())]
        for _ in range(30):  # beginning with its first moment
            found[0].send_signal(signal.SIGINT)
            time.sleep(0.01)
        if found[0].status() != psutil.STATUS_ZOMBIE:
            survived.append(found[0])
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_in_child(Job("m", None, 1, 0, 256), ProviderChoice("adapter"), tmp_path / "run", print, print)
    thread.join()
    assert survived
    assert not psutil.wait_procs(survived, timeout=10)[1]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes have descriptors")
def test_a_process_that_dies_in_the_middle_of_a_message() -> None:
    receiving, sending = multiprocessing.Pipe(duplex=False)
    os.write(sending.fileno(), (100).to_bytes(4, "big") + b"not a hundred bytes")
    sending.close()
    with receiving, pytest.raises(EOFError):
        child_process._receive(receiving, print, print)


@pytest.mark.parametrize(
    ("text", "label", "options"),
    [
        ("adapter", "adapter", {}),
        ("frozen={}", "frozen", {}),
        (
            'ema={"alpha": 0.5, "average": "exact"}',
            "ema (alpha=0.5, average=exact)",
            {"alpha": 0.5, "average": "exact"},
        ),
        ('cached={"path": "a=b"}', "cached (path=a=b)", {"path": "a=b"}),
    ],
)
def test_choice_of_a_provider(text: str, label: str, options: dict[str, object]) -> None:
    choice = ProviderChoice.parse(text)
    assert (choice.label, choice.options) == (label, options)


def test_folders_tell_options_apart_and_not_their_order() -> None:
    one, same, other = (
        ProviderChoice("ema", kwargs)
        for kwargs in ('{"alpha": 1, "sync_steps": 2}', '{"sync_steps": 2, "alpha": 1}', '{"alpha": 1}')
    )
    assert one.folder == same.folder != other.folder
    assert ProviderChoice("a/b").folder == "a_b"
