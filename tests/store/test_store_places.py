"""Where a store can be, and where it cannot."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from store_writers import fill, key_of, right_rows, row_of

from trl_refplug.errors import StoreError, StoreWriteError
from trl_refplug.store import LogProbStore, StoreWarning, summarize, verify


NUMBERS = range(60)


@pytest.fixture
def remote() -> Iterator[str]:
    """An object store."""
    yield "memory://bucket/ref-store"
    filesystem = fsspec.filesystem("memory")
    filesystem.rm("/bucket", recursive=True)


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_paths_and_local_urls_are_the_same_place(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "not" / "there yet"
    with LogProbStore(f"{scheme}{path}", mode="a") as store:
        fill(store, NUMBERS)
    with LogProbStore(path) as store:
        assert right_rows(store, NUMBERS) == set(NUMBERS)
    assert verify(f"{scheme}{path}").ok


def test_relative_paths_stay_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with LogProbStore("here", mode="a") as store:
        monkeypatch.chdir("/")
        fill(store, NUMBERS)
    assert summarize(tmp_path / "here").rows == len(NUMBERS)


def test_an_object_store_is_read_through_a_cache(remote: str, tmp_path: Path) -> None:
    with LogProbStore(remote, mode="a", cache_dir=tmp_path / "one", publish_rows=20) as store:
        fill(store, NUMBERS)
        with LogProbStore(remote, cache_dir=tmp_path / "two") as reader:
            assert right_rows(reader, NUMBERS) == set(NUMBERS)
            fill(store, range(60, 70))
            store.flush()
            reader.refresh()
            assert right_rows(reader, range(70)) == set(range(70))
    assert summarize(remote, tmp_path / "three").rows == 70
    assert verify(remote, cache_dir=tmp_path / "four").ok

    # Files that are in the cache are not fetched again.
    filesystem = fsspec.filesystem("memory")
    kept = {file.name for file in (tmp_path / "two").rglob("*") if file.is_file()}
    assert kept == {Path(file).name for file in filesystem.ls("/bucket/ref-store", detail=False)}
    for file in filesystem.ls("/bucket/ref-store", detail=False):
        filesystem.pipe_file(file, b"")
    with LogProbStore(remote, cache_dir=tmp_path / "two") as reader:
        assert right_rows(reader, range(70)) == set(range(70))


def test_a_damaged_copy_is_fetched_again_and_a_damaged_object_is_ignored(remote: str, tmp_path: Path) -> None:
    with LogProbStore(remote, mode="a", cache_dir=tmp_path, publish_rows=20) as store:
        fill(store, NUMBERS)
    chance = random.Random(0)
    for copy in tmp_path.rglob("*Z-*"):
        data = bytearray(copy.read_bytes())
        data[chance.randrange(len(data))] ^= 1
        copy.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with LogProbStore(remote, cache_dir=tmp_path) as store:
            assert right_rows(store, NUMBERS) == set(NUMBERS)

    filesystem = fsspec.filesystem("memory")
    first = min(filesystem.glob("/bucket/ref-store/*.arrow"))
    filesystem.pipe_file(first, filesystem.cat_file(first)[:-1])
    objects = sorted(filesystem.ls("/bucket/ref-store", detail=False))
    with (
        pytest.warns(StoreWarning, match=f"{Path(first).stem} .* ignored"),
        LogProbStore(remote, mode="a", cache_dir=tmp_path / "other") as store,
    ):
        assert right_rows(store, NUMBERS) == set(range(20, 60))
    assert sorted(filesystem.ls("/bucket/ref-store", detail=False)) == objects


def test_places_that_do_not_exist(remote: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/else", b"")
    with pytest.raises(StoreError, match="there is no store at 'memory://bucket/ref-store'"):
        LogProbStore(remote, cache_dir=tmp_path)
    with pytest.raises(StoreError, match="cannot open a store at 'nonsense://x'"):
        LogProbStore("nonsense://x", mode="a")
    for use in (LogProbStore, summarize, verify):
        with pytest.raises(StoreError, match=r"cannot open a store at 'ftp://localhost:1/store': .*refused"):
            use("ftp://localhost:1/store", cache_dir=tmp_path)
    filesystem = fsspec.filesystem("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(filesystem), "exists", unreachable)
        for use in (LogProbStore, summarize, verify):
            with pytest.raises(StoreError, match=r"cannot read the store 'memory://.*': RuntimeError: no network"):
                use(remote, cache_dir=tmp_path)


def unreachable(*_: object) -> None:
    raise RuntimeError("no network")


def test_colleagues_can_read_what_is_published(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        with LogProbStore(tmp_path / "store", mode="a") as store:
            fill(store, NUMBERS)
    finally:
        os.umask(mask)
    for file in (tmp_path / "store").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_a_path_that_cannot_be_written_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "store", Path("/proc/store")):
        with pytest.raises(StoreWriteError, match=r"cannot write to the store .*Use another path"):
            LogProbStore(path, mode="a")
    with pytest.raises(StoreWriteError, match=r"Read only filesystem\. Use another path"):  # fsspec's ValueError
        LogProbStore("data://store", mode="a", cache_dir=tmp_path)


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_more_rows_than_fit_are_refused_before_they_are_scored(tmp_path: Path, scheme: str) -> None:
    with LogProbStore(f"{scheme}{tmp_path / 'store'}", mode="a", cache_dir=tmp_path / "cache") as store:
        store.ensure_room(tokens=1_000)
        with pytest.raises(StoreWriteError, match=r"bytes free, 4,000,000,000,000,000 needed.* Use another path"):
            store.ensure_room(tokens=10**15)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not sys.platform.startswith("linux") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_keeps_what_was_published(small_disk: Path) -> None:
    def room_for(size: int) -> None:
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        (small_disk / "ballast").write_bytes(bytes(free - size))

    with LogProbStore(small_disk / "store", mode="a", publish_rows=60) as store:
        fill(store, NUMBERS)
        room_for(4096)
        with pytest.raises(StoreWriteError, match=r"cannot publish 60 rows .* The 60 rows published before are kept"):
            fill(store, range(60, 120))
        assert right_rows(store, range(120)) == set(range(120)), "rows that wait are still there to be read"
        with LogProbStore(small_disk / "store") as reader:
            assert right_rows(reader, range(120)) == set(NUMBERS)
        with pytest.raises(StoreWriteError, match="No space left on device"):
            LogProbStore(small_disk / "store", mode="a")
        (small_disk / "ballast").unlink()
        store.flush()  # there is room again
    assert verify(small_disk / "store").ok
    with LogProbStore(small_disk / "store") as reader:
        assert right_rows(reader, range(120)) == set(range(120))
    assert not [file for file in summarize(small_disk / "store").leftovers if file.startswith(".tmp")]


def test_a_disk_that_became_read_only(small_disk: Path) -> None:
    with LogProbStore(small_disk / "store", mode="a", publish_rows=20) as store:
        fill(store, NUMBERS)
    victim = min((small_disk / "store").glob("*.arrow"))
    victim.write_bytes(b"")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreWriteError, match="Read-only file system"):
        LogProbStore(small_disk / "store", mode="a")
    with pytest.warns(StoreWarning, match="ignored"), LogProbStore(small_disk / "store") as store:
        assert right_rows(store, NUMBERS) == set(range(20, 60))


LIMITED = """
import resource, sys
import numpy as np
from trl_refplug.errors import StoreWriteError
from trl_refplug.store import LogProbStore

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    store = LogProbStore(sys.argv[1], mode="a")
except StoreWriteError as error:
    sys.exit("refused: " + str(error))
store.put([b"." * 16], [np.zeros(10, np.float32)])
store.flush()
store.put([b"-" * 16], [np.zeros(10**6, np.float32)])
try:
    store.close()
except StoreWriteError as error:
    sys.exit("kept: " + str(error))
"""


@pytest.mark.parametrize(("limit", "expected"), [(1_000, "refused"), (1_000_000, "kept"), (10**8, "")])
def test_a_limit_on_file_size(tmp_path: Path, limit: int, expected: str) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in result.stderr.splitlines() if line.startswith(("refused: ", "kept: "))]
    assert [line.partition(":")[0] for line in said] == [expected] * bool(expected), result.stderr
    assert bool(result.stderr) == bool(expected)
    with LogProbStore(tmp_path) as store:
        assert len(store) == {"refused": 0, "kept": 1, "": 2}[expected]
    assert not (any(tmp_path.iterdir()) and summarize(tmp_path).leftovers)  # an empty directory is no store


def test_a_shard_that_reads_back_otherwise_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LogProbStore(tmp_path, mode="a")
    publish = store._folder.publish
    monkeypatch.setattr(store._folder, "publish", lambda name, data: publish(name, data.replace(b"ARROW1", b"ARROW2")))
    store.put([key_of(5)], [row_of(5)])
    with pytest.raises(StoreWriteError, match="reads back otherwise"), pytest.warns(StoreWarning, match="set aside"):
        store.flush()
    monkeypatch.undo()
    assert right_rows(store, [5]) == {5}
    store.close()
    assert verify(tmp_path).ok
    with LogProbStore(tmp_path) as store:
        assert right_rows(store, [5]) == {5}
