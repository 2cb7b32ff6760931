"""What a store contains, and whether all of it is intact and its rows agree with each other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trl_refplug.errors import StoreError
from trl_refplug.runtime.files import TEMPORARY_PREFIX
from trl_refplug.store.folder import DAMAGED_SUFFIX, explain_read_errors, open_existing
from trl_refplug.store.format import (
    MANIFEST_SUFFIX,
    SHARD_SUFFIX,
    DamagedFileError,
    Manifest,
    published_shard_names,
    shard_file_names,
)
from trl_refplug.store.journal import JOURNAL_SUFFIX
from trl_refplug.store.shards import PublishedShards


@dataclass(frozen=True)
class StoreSummary:
    """
    What the manifests of a store say. The rows themselves are not read.

    Args:
        location (`str`): The path or URL of the store.
        manifests (`tuple[Manifest, ...]`): The manifests of all shards, oldest first.
        damaged (`dict[str, str]`): The names of shards whose manifest is damaged or whose rows are missing, with the
            reason.
        set_aside (`tuple[str, ...]`): The files of damaged shards, which were renamed so that nobody reads them.
        journals (`tuple[str, ...]`): The files with rows that writers have not published yet. If a writer was killed,
            the next one publishes its rows.
        leftovers (`tuple[str, ...]`): Unfinished files of writers that were killed. They can be deleted when no writer
            is at work.
    """

    location: str
    manifests: tuple[Manifest, ...]
    damaged: dict[str, str]
    set_aside: tuple[str, ...]
    journals: tuple[str, ...]
    leftovers: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Number of rows in all shards. A row that two writers have scored at the same time counts twice."""
        return sum(manifest.rows for manifest in self.manifests)

    @property
    def tokens(self) -> int:
        """Number of log-probs in all shards."""
        return sum(manifest.tokens for manifest in self.manifests)

    @property
    def size(self) -> int:
        """Size of all shards in bytes."""
        return sum(manifest.size for manifest in self.manifests)


@dataclass(frozen=True)
class Conflict:
    """
    Two rows that have the same key and different values.

    Args:
        key (`str`): The key, in hexadecimal.
        shards (`tuple[str, str]`): The name of the shard whose row is used, and of the one whose row differs.
        difference (`float`): Largest difference of a token's log-prob in nats. Infinite if the lengths differ.
    """

    key: str
    shards: tuple[str, str]
    difference: float


@dataclass(frozen=True)
class VerifyReport:
    """
    The result of checking all of a store.

    Args:
        shards (`int`): Number of intact shards.
        rows (`int`): Number of different rows in the intact shards.
        duplicates (`int`): Number of rows whose key an older row has already.
        damaged (`dict[str, str]`): The names of damaged shards, with what is wrong.
        conflicts (`tuple[Conflict, ...]`): Duplicates whose values differ by more than the tolerance.
    """

    shards: int
    rows: int
    duplicates: int
    damaged: dict[str, str]
    conflicts: tuple[Conflict, ...]

    @property
    def ok(self) -> bool:
        """Whether no shard is damaged and no rows conflict."""
        return not self.damaged and not self.conflicts


def _require_store(location: object, names: Iterable[str]) -> None:
    """
    Check that a directory has files of a store.

    Raises:
        StoreError: It has none.
    """
    files = list(names)
    shards = [Path(file).with_suffix(MANIFEST_SUFFIX).name for file in files if file.endswith(SHARD_SUFFIX)]
    if not published_shard_names([*files, *shards]) and not any(
        file.endswith((JOURNAL_SUFFIX, DAMAGED_SUFFIX)) or file.startswith(TEMPORARY_PREFIX) for file in files
    ):
        found = f"found {', '.join(sorted(files)[:3])}{', ...' if len(files) > 3 else ''}" if files else "it is empty"
        raise StoreError(
            f"{str(location)!r} is no store: expected shards or journals, {found}. Check the path, or fill a store "
            "there with `trl-refplug precompute`"
        )


def summarize(location: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> StoreSummary:
    """Read the manifests of a store, without the rows."""
    folder = open_existing(location, cache_dir)
    with explain_read_errors(location):
        present = set(folder.list_files())
        _require_store(location, present)
        names = published_shard_names(present)
        folder.fetch([shard_file_names(name)[0] for name in names])
    manifests, damaged = [], {}
    for name in names:
        manifest_file, shard_file = shard_file_names(name)
        try:
            manifest = Manifest.decode((folder.directory / manifest_file).read_bytes())
            if shard_file not in present:
                raise DamagedFileError(f"there is no file {shard_file}")
        except (DamagedFileError, OSError) as error:
            damaged[name] = str(error)
        else:
            manifests.append(manifest)
    orphans = (file for file in present if file.endswith(SHARD_SUFFIX) and Path(file).stem not in names)
    temporary = (file for file in present if file.startswith(TEMPORARY_PREFIX))
    return StoreSummary(
        location=os.fspath(location),
        manifests=tuple(manifests),
        damaged=damaged,
        set_aside=tuple(sorted(file for file in present if file.endswith(DAMAGED_SUFFIX))),
        journals=tuple(sorted(file for file in present if file.endswith(JOURNAL_SUFFIX))),
        leftovers=tuple(sorted([*orphans, *temporary])),
    )


def verify(
    location: str | os.PathLike[str],
    tolerance: float = 0.02,
    cache_dir: str | os.PathLike[str] | None = None,
) -> VerifyReport:
    """
    Read every byte of a store, check all checksums, and compare the rows that more than one writer has scored.

    Args:
        location (`str` or `os.PathLike`): A directory or an fsspec URL.
        tolerance (`float`): The largest difference, in nats, between two log-probs of a token that is taken for
            rounding. Batches of other shapes change bfloat16 log-probs by up to 6e-3, and other devices by more.
        cache_dir (`str` or `os.PathLike`): The directory for copies of remote shards.
    """
    folder = open_existing(location, cache_dir)
    published = PublishedShards(folder)
    with explain_read_errors(location):
        _require_store(location, folder.list_files())
        damaged = published.refresh()
    names = list(published.manifests)
    conflicts = []
    duplicates = 0
    for number, shard in enumerate(published.shards):
        _, first_shards, first_rows = published.index.find(shard.keys)
        again = np.flatnonzero((first_shards != number) | (first_rows != np.arange(len(shard.keys))))
        duplicates += len(again)
        for row in again.tolist():
            first = int(first_shards[row])
            difference = _difference(published.shards[first].row(int(first_rows[row])), shard.row(row))
            if difference > tolerance:
                conflicts.append(Conflict(shard.keys[row].tobytes().hex(), (names[first], names[number]), difference))
    return VerifyReport(
        shards=len(names),
        rows=len(published.index),
        duplicates=duplicates,
        damaged={name: str(error) for name, error in damaged.items()},
        conflicts=tuple(conflicts),
    )


def _difference(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    if len(first) != len(second):
        return float("inf")
    return float(np.abs(first - second).max(initial=0.0))
