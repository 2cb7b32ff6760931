"""Journals: rows that were put and not published survive if their process is killed."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import pytest
from store_writers import files_of, fill, key_of, right_rows

from trl_refplug import RefPlugWarning
from trl_refplug.store import LogProbStore, journal, summarize


def left_behind(path: Path, journals: dict[str, bytes]) -> None:
    """A store directory with the journals of writers that have died."""
    path.mkdir()
    for name, data in journals.items():
        (path / name).write_bytes(data)


@pytest.fixture
def written(tmp_path: Path) -> tuple[str, bytes]:
    """The journal of a writer that has put rows 0 to 5, two at a time, and published none."""
    with LogProbStore(tmp_path / "written", mode="a", publish_seconds=1e9) as store:
        for first in (0, 2, 4):
            fill(store, range(first, first + 2))
        (file,) = files_of(tmp_path / "written", ".journal")
        return file.name, file.read_bytes()


def test_the_next_writer_publishes_an_abandoned_journal(tmp_path: Path, written: tuple[str, bytes]) -> None:
    left_behind(tmp_path / "store", dict([written]))
    with LogProbStore(tmp_path / "store", mode="a") as store:
        assert right_rows(store, range(9)) == set(range(6))
        assert summarize(tmp_path / "store").rows == 6  # they are published at once, so that others see them
        assert not (tmp_path / "store" / written[0]).exists()
    assert not files_of(tmp_path / "store", ".journal")


def test_a_damaged_journal_gives_right_rows_or_none(tmp_path: Path, written: tuple[str, bytes]) -> None:
    name, data = written
    flipped = [data[:i] + bytes([data[i] ^ 64]) + data[i + 1 :] for i in range(23, len(data), 5)]
    for number, damaged in enumerate([*(data[:i] for i in range(0, len(data), 3)), *flipped]):
        path = tmp_path / f"store-{number}"
        left_behind(path, {name: damaged})
        with LogProbStore(path, mode="a") as store:
            found = right_rows(store, range(9))
            assert found == set(range(len(found)))
            assert len(store) == len(found) < 6
            assert not (path / name).exists()


def test_journals_of_two_writers_with_rows_in_common(tmp_path: Path, written: tuple[str, bytes]) -> None:
    _, data = written
    left_behind(tmp_path / "store", {"a.journal": data, "b.journal": data})
    with LogProbStore(tmp_path / "store", mode="a") as store:
        assert right_rows(store, range(9)) == set(range(6))
    assert summarize(tmp_path / "store").rows == 6


def test_a_journal_of_another_version_is_left_alone(tmp_path: Path, written: tuple[str, bytes]) -> None:
    name, data = written
    newer = data.replace(b"journal 1", b"journal 2")
    left_behind(tmp_path / "store", {name: newer})
    with LogProbStore(tmp_path / "store", mode="a") as store:
        assert len(store) == 0
    assert (tmp_path / "store" / name).read_bytes() == newer


def test_the_journal_of_a_writer_at_work(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with LogProbStore(path, mode="a", publish_seconds=1e9) as writer:
        fill(writer, range(5))
        with LogProbStore(path, mode="a", publish_seconds=1e9) as other, LogProbStore(path) as reader:
            assert right_rows(other, range(9)) == set(range(5))  # so other writers need not score them
            assert len(other) == 5
            assert other.contains([key_of(number) for number in (1, 7)]).tolist() == [True, False]
            assert right_rows(reader, range(9)) == set(range(5))
            fill(other, range(3, 6))
            fill(writer, range(6, 8))
            assert right_rows(other, range(9)) == set(range(6))
            other.refresh()
            assert right_rows(other, range(9)) == set(range(8))
            assert len(other) == 8
            assert other.other_writers == [writer.writer]
        assert summarize(path).rows == 1  # the other writer did not publish the rows that this writer has put
        assert len(summarize(path).journals) == 1
        writer.flush()
        fill(writer, range(8, 9))
        assert summarize(path).rows == 8
    assert not files_of(path, ".journal")
    assert summarize(path).rows == 9


def test_a_writer_at_work_is_killed(tmp_path: Path, written: tuple[str, bytes]) -> None:
    """If another writer has read rows in the journal and so has not scored them, it publishes them when it is done."""
    name, data = written
    with LogProbStore(tmp_path / "store", mode="a") as other:
        (tmp_path / "store" / name).write_bytes(data)
        other.refresh()
        fill(other, range(9))
        assert right_rows(other, range(9)) == set(range(9))
        other.flush()
        assert summarize(tmp_path / "store").rows == 9
        assert not (tmp_path / "store" / name).exists()
        assert right_rows(other, range(9)) == set(range(9))


def test_reading_a_journal_while_it_is_written(tmp_path: Path, written: tuple[str, bytes]) -> None:
    """A reader of an incomplete journal gets only right rows, and gets the rest later."""
    name, data = written
    with LogProbStore(tmp_path / "store", mode="a") as other:
        for end in range(0, len(data) + 1, 3):
            (tmp_path / "store" / name).write_bytes(data[:end])
            other.refresh()
            found = right_rows(other, range(9))
            assert found == set(range(len(found)))
        (tmp_path / "store" / name).write_bytes(data)
        other.refresh()
        assert right_rows(other, range(9)) == set(range(6))


def test_a_journal_emptied_and_written_again_within_a_tick_of_the_clock(tmp_path: Path) -> None:
    """Neither the size nor the modification time of the file shows that its rows are others."""
    path = tmp_path / "store"
    time_of_both = time.time() + 3600  # this is later than everything that happens here
    sizes = set()
    with LogProbStore(path, mode="a", publish_seconds=1e9) as writer, LogProbStore(path) as reader:
        for number in (1, 42):  # rows of the same length
            fill(writer, [number])
            (file,) = files_of(path, ".journal")
            os.utime(file, (time_of_both, time_of_both))
            sizes.add(file.stat().st_size)
            reader.refresh()
            assert number in right_rows(reader, [1, 42])
            writer.flush()
    assert len(sizes) == 1


def test_readers_change_nothing(tmp_path: Path, written: tuple[str, bytes]) -> None:
    name, data = written
    left_behind(tmp_path / "store", {name: data})
    with LogProbStore(tmp_path / "store") as store:
        assert right_rows(store, range(9)) == set(range(6))
    assert (tmp_path / "store" / name).read_bytes() == data
    assert summarize(tmp_path / "store").rows == 0


def test_where_files_cannot_be_locked(
    tmp_path: Path, written: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its age shows that a journal is abandoned."""

    def refused(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(journal.fcntl, "flock", refused)
    name, data = written
    left_behind(tmp_path / "store", {name: data})
    with LogProbStore(tmp_path / "store", mode="a"):
        assert summarize(tmp_path / "store").rows == 0
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / "store" / name, (an_hour_ago, an_hour_ago))
    with LogProbStore(tmp_path / "store", mode="a") as store:
        assert right_rows(store, range(9)) == set(range(6))


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = LogProbStore(path, mode="a", publish_seconds=1e9)
    path.rmdir()
    with pytest.warns(RefPlugWarning, match=r"journal .* cannot be written .*No such file"):
        fill(store, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is no second warning
        fill(store, range(3, 6))
    assert right_rows(store, range(9)) == set(range(6))
    path.mkdir()
    store.close()
    assert summarize(path).rows == 6


def test_without_unpublished_rows_there_is_no_journal(tmp_path: Path) -> None:
    with LogProbStore(tmp_path / "store", mode="a", publish_rows=2) as store:
        fill(store, range(4))
        assert not files_of(tmp_path / "store", ".journal")
