"""Several processes that use one store at once, and processes that are killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from store_writers import right_rows, write_all, write_until_killed

from trl_refplug.store import LogProbStore, summarize, verify


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    return multiprocessing.get_context("forkserver")


def test_four_processes_fill_one_store(tmp_path: Path, processes: ForkServerContext) -> None:
    numbers = range(2_000)
    options = {"publish_rows": 100}
    writers = [processes.Process(target=write_all, args=(str(tmp_path), numbers, seed, options)) for seed in range(4)]
    for writer in writers:
        writer.start()
    with pytest.MonkeyPatch.context() as patch:  # this process reads all the time
        patch.setattr("warnings.warn", fail)
        with LogProbStore(tmp_path, mode="a") as reader:
            seen: set[int] = set()
            while any(writer.is_alive() for writer in writers):
                reader.refresh()
                now = right_rows(reader, numbers)
                assert seen <= now
                seen = now
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    with LogProbStore(tmp_path) as store:
        assert len(store) == 2_000
        assert right_rows(store, numbers) == set(numbers)
    report = verify(tmp_path)
    assert report.ok
    assert report.rows == 2_000
    assert report.rows + report.duplicates == summarize(tmp_path).rows
    assert not summarize(tmp_path).leftovers


def fail(message: object, *_: object, **__: object) -> None:
    raise AssertionError(message)


def kill_at_random_moments(tmp_path: Path, processes: ForkServerContext, times: int) -> None:
    """Kill a writer `times` times. All rows that it had put must be there and right, and no file may be damaged."""
    chance = random.Random(times)
    path, log = tmp_path / "store", tmp_path / "acknowledged"
    acknowledged: list[int] = []
    killed_with_rows = 0
    for attempt in range(times):
        if attempt % 50 == 0:  # start a new store now and then, so that opening it stays fast
            path = tmp_path / f"store-{attempt}"
            acknowledged = []
        first = 1_000_000 * attempt
        log.unlink(missing_ok=True)
        log.touch()
        writer: BaseProcess = processes.Process(target=write_until_killed, args=(str(path), first, str(log)))
        writer.start()
        assert writer.pid is not None
        deadline = time.monotonic() + 60
        if chance.random() < 0.8:  # most are killed while publishing, some before they have begun
            while not log.stat().st_size and time.monotonic() < deadline:
                time.sleep(0.001)
        time.sleep(chance.expovariate(1 / 0.02))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        data = log.read_bytes()
        put = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data) // 8 * 8, 8)]
        killed_with_rows += bool(put)
        acknowledged += put
        with LogProbStore(path, mode="a") as store:
            assert right_rows(store, acknowledged) == set(acknowledged), f"rows were lost (kill {attempt})"
            after = range(first + len(put), first + len(put) + 100)
            # Rows whose `put` did not return may be there, but only whole micro-batches and only right values.
            assert len(right_rows(store, after)) in (0, 5)
            rows = len(store)
            assert not rows or summarize(path).rows == rows
        if rows:  # otherwise it was killed before it put anything, and an empty directory is no store
            assert verify(path).ok
            assert not summarize(path).journals
    assert killed_with_rows > times / 2


def test_killed_writers_lose_nothing_they_put(tmp_path: Path, processes: ForkServerContext) -> None:
    kill_at_random_moments(tmp_path, processes, times=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_writers_lose_nothing_they_put_a_thousand_times(tmp_path: Path, processes: ForkServerContext) -> None:
    kill_at_random_moments(tmp_path, processes, times=1_000)
