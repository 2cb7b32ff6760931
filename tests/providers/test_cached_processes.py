"""`cached` over several processes, and over processes that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_refplug.store import summarize, verify

from .. import tiny
from ..trainers.runs import build, train
from ..trainers.test_distributed import torchrun


ROOT = Path(__file__).parents[2]


def using(store, fill="ahead"):
    return {"ref_provider": "cached", "ref_provider_kwargs": {"path": str(store), "fill": fill}}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_ranks_fill_one_store(lora, tmp_path):
    store = tmp_path / "store"
    jobs = []
    for kind, rows in (("dpo", 150), ("kto", 12)):  # ranks share a data set in blocks of 64 rows
        jobs.append({"kind": kind, "rows": rows, "lora": lora, "args": using(store)})
        jobs.append({"kind": kind, "rows": rows, "lora": lora, "args": {"ref_provider": "frozen"}})
    done = torchrun(tmp_path, *jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        results = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for cached, frozen in zip(results[::2], results[1::2], strict=True):
            for ours, theirs in zip(cached["logs"], frozen["logs"], strict=True):
                assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    report = verify(store)
    assert report.ok
    assert report.duplicates == 0
    assert len({manifest.name for manifest in summarize(store).manifests}) >= 3  # both ranks had their part
    build("dpo", tmp_path, tiny.saved(tmp_path), args=using(store, "never"))
    build("kto", tmp_path, tiny.saved(tmp_path), args=using(store, "never"))


def test_goes_on_where_it_was_killed(tmp_path):
    path, store = tiny.saved(tmp_path), tmp_path / "store"
    command = [sys.executable, "-m", "tests.providers.fill_until_killed", path, str(store), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ.copy(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while process.poll() is None and len(list(store.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = summarize(store)
    assert kept.rows > 0
    data = tiny.preference_data(600)

    run = train("dpo", tmp_path, path, args=using(store), train_dataset=data)

    report = verify(store)
    assert report.ok
    assert report.duplicates == 0
    assert report.rows > kept.rows  # it was killed before the end
    frozen = train("dpo", tmp_path, path, args={"ref_provider": "frozen"}, train_dataset=data)
    for ours, theirs in zip(run.logs, frozen.logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    build("dpo", tmp_path, path, args=using(store, "never"), train_dataset=data)
