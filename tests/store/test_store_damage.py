"""Damaged files are noticed, named and set aside, and are never read."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from store_writers import files_of, fill, key_of, right_rows

from trl_refplug.errors import StoreVersionError
from trl_refplug.store import LogProbStore, StoreWarning, summarize, verify


NUMBERS = range(60)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of three shards with rows 0-19, 20-39 and 40-59."""
    path = tmp_path / "store"
    with LogProbStore(path, mode="a", provenance={"run": 1}) as store:
        for first in (0, 20, 40):
            fill(store, range(first, first + 20))
            store.flush()
    return path


def flip(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, chance: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data))])


def zero_the_end(file: Path, chance: random.Random) -> None:
    """What a power cut can leave of a file that was not synchronized: the right size, but zeros."""
    data = file.read_bytes()
    keep = chance.randrange(len(data) - 1)
    file.write_bytes(data[:keep] + bytes(len(data) - keep))


def swap_with_another(file: Path, chance: random.Random) -> None:
    """An intact file under the wrong name."""
    other = chance.choice([other for other in files_of(file.parent, file.suffix) if other != file])
    file.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [flip, truncate, zero_the_end, swap_with_another])
@pytest.mark.parametrize("suffix", [".arrow", ".json"])
@pytest.mark.parametrize("seed", range(15))
def test_a_damaged_file_is_named_set_aside_and_never_read(
    path: Path, suffix: str, damage: Callable[[Path, random.Random], None], seed: int
) -> None:
    chance = random.Random(seed)
    hit = chance.randrange(3)
    victim = files_of(path, suffix)[hit]
    damage(victim, chance)
    left = set(NUMBERS) - set(range(20 * hit, 20 * hit + 20))
    before = {file.name for file in path.iterdir()}

    with pytest.warns(StoreWarning, match=f"shard {victim.stem} .* ignored"):
        store = LogProbStore(path)
    with store:
        assert right_rows(store, NUMBERS) == left
    assert {file.name for file in path.iterdir()} == before, "a reader must change nothing"
    report = verify(path)
    assert not report.ok
    assert set(report.damaged) == {victim.stem}

    with pytest.warns(StoreWarning, match=f"shard {victim.stem} .* set aside"):
        store = LogProbStore(path, mode="a")
    with store:
        assert right_rows(store, NUMBERS) == left
        fill(store, NUMBERS)  # scored again
        assert right_rows(store, NUMBERS) == set(NUMBERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with LogProbStore(path, mode="a") as store:
            assert right_rows(store, NUMBERS) == set(NUMBERS)
    summary = summarize(path)
    assert set(summary.set_aside) == {f"{victim.stem}.json.damaged", f"{victim.stem}.arrow.damaged"}
    assert summary.rows == 60
    assert not summary.damaged
    assert not summary.leftovers


def test_damage_in_a_shard_published_later_is_noticed_by_refresh(path: Path) -> None:
    with LogProbStore(path) as reader:
        with LogProbStore(path, mode="a") as writer:
            fill(writer, range(60, 70))
        victim = files_of(path, ".arrow")[-1]
        flip(victim, random.Random(0))
        with pytest.warns(StoreWarning, match=victim.stem):
            reader.refresh()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # there is no second warning
            reader.refresh()
        assert right_rows(reader, range(70)) == set(NUMBERS)


def test_a_manifest_without_its_shard_is_damage_and_a_shard_without_its_manifest_is_nothing(path: Path) -> None:
    first, second, _ = files_of(path, ".arrow")
    first.unlink()
    second.with_suffix(".json").unlink()
    summary = summarize(path)
    assert set(summary.damaged) == {first.stem}
    assert summary.leftovers == (second.name,)
    assert set(verify(path).damaged) == {first.stem}
    with pytest.warns(StoreWarning, match=first.stem) as caught, LogProbStore(path, mode="a") as store:
        assert right_rows(store, NUMBERS) == set(range(40, 60))
    assert [warning.category for warning in caught].count(StoreWarning) == 1


def test_a_newer_format_version_is_refused_by_name(path: Path) -> None:
    reader = LogProbStore(path)
    with LogProbStore(path, mode="a") as store:
        fill(store, range(60, 70))
    # A later release may write fields that this one does not know, in the same envelope.
    newer = path / "20991231T235959.000000Z-0123456789abcdef.json"
    body = json.dumps({"chunks": [1, 2], "format_version": 2, "name": newer.stem})
    checksum = xxhash.xxh3_128_hexdigest(body.encode())
    newer.write_text(f'{{"manifest": {body}, "xxh3_128": "{checksum}"}}\n')
    before = {file.name for file in path.iterdir()}
    for use in (LogProbStore, lambda path: LogProbStore(path, mode="a"), summarize, verify):
        with pytest.raises(StoreVersionError, match=f"{newer.stem} has format version 2, .* up to version 1"):
            use(path)
    assert {file.name for file in path.iterdir()} == before
    with pytest.raises(StoreVersionError):
        reader.refresh()
    newer.unlink()
    reader.refresh()
    assert right_rows(reader, range(70)) == set(range(70))


def test_a_damaged_version_number_is_damage_and_not_a_newer_version(path: Path) -> None:
    victim = files_of(path, ".json")[1]
    victim.write_bytes(victim.read_bytes().replace(b'"format_version": 1', b'"format_version": 3'))
    with pytest.warns(StoreWarning, match=victim.stem), LogProbStore(path) as store:
        assert right_rows(store, NUMBERS) == set(NUMBERS) - set(range(20, 40))


def test_verify_reports_rows_that_disagree_and_not_those_that_are_rounded(tmp_path: Path) -> None:
    stores = [LogProbStore(tmp_path / f"of-{number}", mode="a") for number in range(4)]
    row = np.array([-1.0, -2.0], np.float32)
    stores[0].put([key_of(0), key_of(1), key_of(2), key_of(3)], [row] * 4)
    stores[1].put([key_of(0), key_of(1)], [row + np.float32(1e-3), row + np.float32([0, 0.5])])
    stores[2].put([key_of(2)], [row[:1]])
    stores[3].put([key_of(3)], [row])
    path = tmp_path / "merged"
    for number, store in enumerate(stores):
        store.close()
        shutil.copytree(tmp_path / f"of-{number}", path, dirs_exist_ok=True)
    report = verify(path)
    assert not report.ok
    assert (report.shards, report.rows, report.duplicates, report.damaged) == (4, 4, 4, {})
    names = [manifest.name for manifest in summarize(path).manifests]
    found = {(conflict.key, conflict.shards): conflict.difference for conflict in report.conflicts}
    assert found == {
        (key_of(1).hex(), (names[0], names[1])): 0.5,
        (key_of(2).hex(), (names[0], names[2])): float("inf"),
    }
    assert len(verify(path, tolerance=1e-4).conflicts) == 3
    with LogProbStore(path) as store:  # the row that was published first is used
        rows = store.lookup([key_of(number) for number in range(4)])
        assert [row.tolist() for row in rows] == [[-1.0, -2.0]] * 4


def test_a_copied_directory_is_a_store(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(path)
    with LogProbStore(tmp_path / "elsewhere" / "copy") as store:
        assert right_rows(store, NUMBERS) == set(NUMBERS)
