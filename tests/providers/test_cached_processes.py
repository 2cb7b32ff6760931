"""`cached` with several processes, some of which are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trl_refplug.store import LogProbStore, summarize, verify

from .. import tiny
from ..trainers.runs import build, train
from ..trainers.test_distributed import on_two_ranks
from . import filling_processes


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
    for results in on_two_ranks(tmp_path, *jobs):
        for cached, frozen in zip(results[::2], results[1::2], strict=True):
            for ours, theirs in zip(cached["logs"], frozen["logs"], strict=True):
                assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    report = verify(store)
    assert report.ok  # a row that two of them published in the same instant is there twice, with the same values
    assert report.duplicates == 0
    assert len({manifest.name for manifest in summarize(store).manifests}) >= 3  # both ranks have written
    build("dpo", tmp_path, tiny.saved(tmp_path), args=using(store, "never"))
    build("kto", tmp_path, tiny.saved(tmp_path), args=using(store, "never"))


class Fillers:
    """Starts processes that fill a store, without waiting seconds for imports."""

    def __init__(self):
        command = [sys.executable, "-m", filling_processes.__name__]
        self.server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _ask(self, *command):
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, *arguments):
        return self._ask("fill", *map(str, arguments))

    def wait(self, pid):
        return self._ask("wait", pid)


@pytest.fixture(scope="module")
def fillers():
    started = Fillers()
    yield started
    started.server.stdin.close()
    assert started.server.wait() == 0


def all_right(path, store, tmp_path):
    """Every row that a run asks for is in the store, and the run's losses are those of `frozen`."""
    data = tiny.preference_data(filling_processes.ROWS)
    run = train("dpo", tmp_path, path, args=using(store, "never"), train_dataset=data)
    frozen = train("dpo", tmp_path, path, args={"ref_provider": "frozen"}, train_dataset=data)
    for ours, theirs in zip(run.logs, frozen.logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    right = tmp_path / "right"
    build("dpo", tmp_path, path, args=using(right), train_dataset=data)
    with LogProbStore(right) as expected, LogProbStore(store) as found:
        keys = every_key(right)
        assert sorted(every_key(store)) == sorted(keys)
        for ours, theirs in zip(found.lookup(keys), expected.lookup(keys), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def every_key(store):
    tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in store.glob("*.arrow")]
    return sorted({key for table in tables for key in table["key"].to_pylist()})


def test_killed_twenty_times(fillers, tmp_path):
    """At whatever moment a process is killed, the rows of its finished forward passes are in the store, and right."""
    path, chance = tiny.saved(tmp_path), random.Random(0)
    store, log = tmp_path / "store", tmp_path / "put"
    killed = acknowledged = 0
    while killed < 20:
        log.unlink(missing_ok=True)
        log.touch()
        filler = fillers.start(path, store, tmp_path, log)
        deadline = time.monotonic() + 60
        if chance.random() < 0.9:  # most are killed while they fill, and some before that
            while not log.stat().st_size and time.monotonic() < deadline:
                time.sleep(0.001)
        time.sleep(chance.expovariate(1 / 0.03))
        os.kill(filler, signal.SIGKILL)  # not waited for yet, so it exists
        status = fillers.wait(filler)
        data = log.read_bytes()
        put = [data[i : i + 16] for i in range(0, len(data) // 16 * 16, 16)]
        acknowledged += len(put)
        killed += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL)
        with LogProbStore(store, mode="a") as opened:
            assert opened.contains(put).all(), f"rows were lost (kill {killed})"
            complete = len(opened) == 2 * filling_processes.ROWS
        report = verify(store)
        assert report.ok  # a row that two of them published in the same instant is there twice, with the same values
        assert report.duplicates == 0
        if complete:  # the store was full before all kills were done: check it, and begin with another
            all_right(path, store, tmp_path / f"checked-{killed}")
            store = tmp_path / f"store-{len(list(tmp_path.glob('store*')))}"
    assert acknowledged > 200
    assert fillers.wait(fillers.start(path, store, tmp_path)) == 0
    all_right(path, store, tmp_path / "checked")


def test_four_processes_fill_one_store(fillers, tmp_path):
    path, store = tiny.saved(tmp_path), tmp_path / "store"
    logs = [tmp_path / f"put-{number}" for number in range(4)]
    started = [fillers.start(path, store, tmp_path / str(number), log) for number, log in enumerate(logs)]
    assert [fillers.wait(filler) for filler in started] == [0, 0, 0, 0]
    report = verify(store, tolerance=1e-5)
    assert report.ok  # a row that two of them put in the same instant is there twice, with the same values
    assert report.rows == 2 * filling_processes.ROWS
    summary = summarize(store)
    assert not summary.leftovers
    assert not summary.journals
    all_right(path, store, tmp_path)
    # They share the work. Alone, each would have scored every row.
    scored = sum(log.stat().st_size // 16 for log in logs if log.exists())
    assert scored < 2 * report.rows
