"""Comparing a store with a dict: whatever is done to it, it returns the rows that were put, bit for bit."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from store_writers import fill, key_of, right_rows, row_of

from trl_refplug.errors import InvalidLogProbsError, StoreError
from trl_refplug.store import LogProbStore, summarize
from trl_refplug.store.index import SortedIndex


# Keys are made of few different halves, because keys that share a half are the hard case for the index.
halves = st.sampled_from([b"\0" * 8, b"\xff" * 8, b"one half", b"\0" * 7 + b"\1"])
keys = st.builds(bytes.__add__, halves, halves)
values = arrays(np.float32, st.integers(0, 4), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


class StoreMachine(RuleBasedStateMachine):
    """A writing and a reading store on one directory, and the dict that they must agree with."""

    @initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "store"
        self.writer = LogProbStore(self.path, mode="a", publish_rows=5)
        self.reader = LogProbStore(self.path)
        self.expected: dict[bytes, np.ndarray] = {}
        self.seen_by_reader: set[bytes] = set()

    @rule(items=st.lists(st.tuples(keys, values), max_size=8))
    def put(self, items: list[tuple[bytes, np.ndarray]]) -> None:
        self.writer.put([key for key, _ in items], [row for _, row in items])
        for key, row in items:
            self.expected.setdefault(key, row.copy())
            row[:] = 1  # the array belongs to the caller, so the store must have copied it

    @rule()
    def flush(self) -> None:
        self.writer.flush()

    @rule()
    def refresh(self) -> None:
        self.reader.refresh()
        self.seen_by_reader = set(self.expected)  # whether published or only put

    @rule()
    def reopen(self) -> None:
        self.writer.close()
        self.writer = LogProbStore(self.path, mode="a", publish_rows=5)

    @rule(wanted=st.lists(keys, max_size=10))
    def look_up(self, wanted: list[bytes]) -> None:
        self.check(self.writer, wanted, set(self.expected))
        self.check(self.reader, wanted, self.seen_by_reader)

    @invariant()
    def count(self) -> None:
        assert len(self.writer) == len(self.expected)
        assert len(self.reader) == len(self.seen_by_reader)

    def check(self, store: LogProbStore, wanted: list[bytes], there: set[bytes]) -> None:
        answer = store.lookup(wanted)
        assert store.contains(wanted).tolist() == [key in there for key in wanted]
        for key, row in zip(wanted, answer, strict=True):
            if key in there:
                assert row.tobytes() == self.expected[key].tobytes()  # this compares the sign of zero, too
                row[:] = 1  # the returned array is a copy, so this must not change the store
            else:
                assert row is None

    def teardown(self) -> None:
        if hasattr(self, "writer"):
            self.writer.close()
            self.directory.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=20)


def test_many_rows_in_many_shards(tmp_path: Path) -> None:
    numbers = range(5_000)
    with LogProbStore(tmp_path, mode="a", publish_rows=97, publish_seconds=1e9) as store:
        for i in range(0, 5_000, 50):
            fill(store, numbers[i : i + 50])
    shuffled = np.random.default_rng(0).permutation(6_000).tolist()
    with LogProbStore(tmp_path) as store:
        assert len(summarize(tmp_path).manifests) == 5_000 // 97 + 1
        assert right_rows(store, shuffled) == set(numbers)


def test_the_index_of_a_million_rows_fits_64_megabytes_even_while_it_is_built() -> None:
    rng = np.random.default_rng(0)
    shards = [(i, rng.integers(0, 2**64, (100_000, 2), np.uint64)) for i in range(10)]
    tracemalloc.start()
    try:
        index = SortedIndex()
        index.add(shards)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(index) == 1_000_000
    assert kept < 26e6
    assert peak < 64e6
    for number, shard_keys in shards:
        found, at_shard, at_row = index.find(shard_keys)
        assert found.all()
        assert (at_shard == number).all()
        assert (at_row == np.arange(100_000)).all()


def test_a_shard_is_published_after_so_many_rows_bytes_or_seconds(tmp_path: Path) -> None:
    def shards(name: str, **limits: float) -> int:
        off = {"publish_rows": 10**9, "publish_bytes": 10**9, "publish_seconds": 1e9}
        with LogProbStore(tmp_path / name, mode="a", **{**off, **limits}) as store:
            for i in range(0, 20, 2):
                store.put([key_of(i), key_of(i + 1)], [np.zeros(10, np.float32)] * 2)
            return len(summarize(tmp_path / name).manifests)

    assert shards("never") == 0
    assert shards("rows", publish_rows=3) == 6
    assert shards("bytes", publish_bytes=200) == 4
    assert shards("seconds", publish_seconds=0.0) == 10


def test_rows_are_readable_by_plain_arrow_and_carry_their_provenance(tmp_path: Path) -> None:
    import pyarrow as pa

    with LogProbStore(tmp_path, mode="a", provenance={"identity": {"digest": "ü"}}) as store:
        fill(store, range(30))
    (manifest,) = summarize(tmp_path).manifests
    table = pa.ipc.open_file(tmp_path / f"{manifest.name}.arrow").read_all()
    table.validate(full=True)
    assert table["key"].to_pylist() == [key_of(number) for number in range(30)]
    assert table["log_probs"].to_pylist() == [row_of(number).tolist() for number in range(30)]
    assert manifest.rows == 30
    assert manifest.tokens == sum(range(30))
    assert manifest.provenance["identity"] == {"digest": "ü"}
    assert manifest.provenance["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize(
    "row",
    [
        np.array([0.0, np.nan], np.float32),
        np.array([-np.inf], np.float32),
        np.array([-1.0], np.float64),
        np.array([[-1.0]], np.float32),
    ],
)
def test_rows_that_are_no_log_probs_are_refused_whole(tmp_path: Path, row: np.ndarray) -> None:
    with LogProbStore(tmp_path, mode="a") as store:
        with pytest.raises(InvalidLogProbsError, match=key_of(2).hex()):
            store.put([key_of(1), key_of(2)], [row_of(1), row])
        assert len(store) == 0


def test_misuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        LogProbStore(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match='mode must be "r" or "a"'):
        LogProbStore(tmp_path, mode="w")
    with pytest.raises(TypeError, match="not JSON serializable"):
        LogProbStore(tmp_path, mode="a", provenance={"identity": object()})
    with LogProbStore(tmp_path) as store, pytest.raises(StoreError, match="open for reading"):
        fill(store, [1])
    store = LogProbStore(tmp_path, mode="a")
    with pytest.raises(ValueError, match="16 bytes, got one of 15"):
        store.lookup([b"." * 15, b"." * 17])
    with pytest.raises(ValueError, match="2 keys and 1 rows"):
        store.put([key_of(1), key_of(2)], [row_of(1)])
    store.close()
    store.close()
    for use in (lambda: store.lookup([key_of(1)]), store.refresh, store.flush, lambda: fill(store, [1])):
        with pytest.raises(StoreError, match="is closed"):
            use()


def test_rows_survive_an_exception_in_the_block_that_wrote_them(tmp_path: Path) -> None:
    def interrupted() -> None:
        with LogProbStore(tmp_path, mode="a") as store:
            fill(store, range(10))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with LogProbStore(tmp_path) as store:
        assert right_rows(store, range(10)) == set(range(10))


def test_other_files_in_the_directory_are_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "data.arrow").write_text("not mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with LogProbStore(tmp_path, mode="a") as store:
            assert len(store) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"notes.json", "data.arrow"}


def test_the_store_needs_neither_torch_nor_pandas(tmp_path: Path) -> None:
    program = (
        "import sys; from trl_refplug.store import LogProbStore; import numpy as np\n"
        "with LogProbStore(sys.argv[1], mode='a') as store:\n"
        "    store.put([b'.' * 16], [np.zeros(3, np.float32)]); store.flush(); store.lookup([b'.' * 16])\n"
        "print([name for name in ('torch', 'pandas', 'fsspec', 'transformers') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program, str(tmp_path)], text=True).strip() == "[]"


def test_of_two_writers_of_a_row_the_first_to_publish_counts(tmp_path: Path) -> None:
    with LogProbStore(tmp_path, mode="a") as first, LogProbStore(tmp_path, mode="a") as second:
        for store, numbers, value in ((first, range(3), -1.0), (second, range(2, 5), -2.0)):
            store.put([bytes([number] * 16) for number in numbers], [np.full(2, value, np.float32)] * 3)
        first.flush()
        second.flush()
        keys = [bytes([number] * 16) for number in range(5)]
        for store in (second, LogProbStore(tmp_path)):
            assert [row[0] for row in store.lookup(keys)] == [-1.0, -1.0, -1.0, -2.0, -2.0]
        assert summarize(tmp_path).rows == 5
        second.put(keys[:1], [np.full(2, -3.0, np.float32)])
        second.flush()  # nothing is left to publish
        assert len(summarize(tmp_path).manifests) == 2
