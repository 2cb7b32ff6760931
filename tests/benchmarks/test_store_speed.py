"""How fast a log-prob store of a million rows is. Prints; run with `-m benchmark -s`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from trl_refplug.store import LogProbStore, RowKey, ScoringFacts


pytestmark = pytest.mark.benchmark

ROWS = 1_000_000
MICRO_BATCH = 64
MEAN_TOKENS = 64


def random_rows(seed: int, count: int) -> tuple[list[bytes], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    keys = rng.bytes(16 * count)
    lengths = rng.integers(1, 2 * MEAN_TOKENS, count)
    values = -rng.random(int(lengths.sum()), dtype=np.float32)
    return [keys[16 * i : 16 * (i + 1)] for i in range(count)], np.split(values, np.cumsum(lengths)[:-1])


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("million") / "store"
    seconds = tokens = 0.0
    with LogProbStore(path, mode="a") as store:
        for block in range(20):
            keys, rows = random_rows(block, ROWS // 20)
            start = time.perf_counter()
            for i in range(0, len(keys), MICRO_BATCH):
                store.put(keys[i : i + MICRO_BATCH], rows[i : i + MICRO_BATCH])
            seconds += time.perf_counter() - start
            tokens += sum(map(len, rows))
        start = time.perf_counter()
    seconds += time.perf_counter() - start
    print(
        f"\nfill, micro-batches of {MICRO_BATCH}: {ROWS / seconds:,.0f} rows/s, {tokens * 4 / seconds / 1e6:,.0f} MB/s"
    )
    return path


MEASURE_OPEN = """
import sys, time, tracemalloc
from trl_refplug.store import LogProbStore, summarize
import pyarrow.ipc

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

before = anonymous()
start = time.perf_counter()
store = LogProbStore(sys.argv[1])
seconds, kept = time.perf_counter() - start, anonymous() - before
summary = summarize(sys.argv[1])
what = f"{len(store):,} rows in {len(summary.manifests)} shards, {summary.size / 1e6:,.0f} MB"
print(f"open {what}: {seconds:.2f} s, ", end="")
store.close()
tracemalloc.start()
LogProbStore(sys.argv[1])
peak = tracemalloc.get_traced_memory()[1] / 2**20
print(f"{kept:.0f} MiB kept, {peak:.0f} MiB at the peak (mapped files apart)")
"""


def test_open(million: Path) -> None:
    for _ in range(3):
        print("\n" + subprocess.check_output([sys.executable, "-c", MEASURE_OPEN, str(million)], text=True), end="")


@pytest.mark.parametrize("batch", [8, 64, 1024, 100_000])
@pytest.mark.parametrize("order", ["written", "shuffled"])
def test_lookup(million: Path, batch: int, order: str) -> None:
    keys = [key for block in range(2) for key in random_rows(block, ROWS // 20)[0]]
    if order == "shuffled":
        np.random.default_rng(0).shuffle(keys)
    with LogProbStore(million) as store:
        start = time.perf_counter()
        tokens = 0
        for i in range(0, len(keys), batch):
            tokens += sum(map(len, store.lookup(keys[i : i + batch])))
        seconds = time.perf_counter() - start
    print(
        f"\nlook-up, batches of {batch:,}, {order}: {len(keys) / seconds:,.0f} rows/s, "
        f"{tokens * 4 / seconds / 1e6:,.0f} MB/s"
    )


def test_refresh(million: Path) -> None:
    with LogProbStore(million) as reader:
        with LogProbStore(million, mode="a") as writer:
            writer.put(*random_rows(99, 1000))
        start = time.perf_counter()
        reader.refresh()
        print(f"\nrefresh of a million rows by a thousand: {(time.perf_counter() - start) * 1e3:.0f} ms")


def test_keys() -> None:
    facts = ScoringFacts("frozen-1234", attention_implementation="sdpa", scoring_mode="exact")
    ids = np.random.default_rng(0).integers(0, 100_000, (1000, 512))
    scored = np.arange(256, 512)
    start = time.perf_counter()
    for _ in range(20):
        for row in ids:
            RowKey(facts, row, scored).digest()
    print(f"\nkeys of rows of 512 tokens: {20 * len(ids) / (time.perf_counter() - start):,.0f} rows/s")


def test_import() -> None:
    command = "import time; t = time.perf_counter(); import trl_refplug.store; print(time.perf_counter() - t)"
    seconds = min(float(subprocess.check_output([sys.executable, "-c", command])) for _ in range(5))
    print(f"\nimport trl_refplug.store: {seconds * 1e3:.0f} ms")
