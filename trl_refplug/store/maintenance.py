"""Looking after a store: what is in it, whether all of it is intact, whether its rows agree with each other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trl_refplug.errors import StoreError
from trl_refplug.store.catalogue import Catalogue
from trl_refplug.store.folder import DAMAGED_SUFFIX, TEMPORARY_PREFIX, open_existing, reading
from trl_refplug.store.format import (
    MANIFEST_SUFFIX,
    SHARD_SUFFIX,
    DamagedFileError,
    Manifest,
    files_of,
    published_names,
)
from trl_refplug.store.journal import JOURNAL_SUFFIX


@dataclass(frozen=True)
class StoreSummary:
    """
    What the manifests of a store say. The shards themselves are not read.

    Args:
        location (`str`): Where the store is.
        manifests (`tuple[Manifest, ...]`): Of all shards, oldest first.
        damaged (`dict[str, str]`): Shards whose manifest cannot be used, or that are gone, and why.
        set_aside (`tuple[str, ...]`): Files of damaged shards that were taken out of the store.
        journals (`tuple[str, ...]`): Files with the rows that writers have not published yet. Those of a writer that
            was killed are published by the next one.
        leftovers (`tuple[str, ...]`): Files of writers that were killed before they published. Of no use to anyone,
            once no writer is at work.
    """

    location: str
    manifests: tuple[Manifest, ...]
    damaged: dict[str, str]
    set_aside: tuple[str, ...]
    journals: tuple[str, ...]
    leftovers: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Rows in all shards. A row that two writers scored at once counts twice."""
        return sum(manifest.rows for manifest in self.manifests)

    @property
    def tokens(self) -> int:
        """Log-probs in all shards."""
        return sum(manifest.tokens for manifest in self.manifests)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(manifest.size for manifest in self.manifests)


@dataclass(frozen=True)
class Conflict:
    """
    Two rows with one key and different values.

    Args:
        key (`str`): The key, as hex digits.
        shards (`tuple[str, str]`): The shard whose row is used, and the one that disagrees.
        difference (`float`): Largest difference of a token's log-prob in nats; infinite when the lengths differ.
    """

    key: str
    shards: tuple[str, str]
    difference: float


@dataclass(frozen=True)
class VerifyReport:
    """
    The result of reading all of a store.

    Args:
        shards (`int`): Number of intact shards.
        rows (`int`): Number of different rows in them.
        duplicates (`int`): Number of rows that another shard has, too.
        damaged (`dict[str, str]`): Damaged shards and what is wrong with them.
        conflicts (`tuple[Conflict, ...]`): Duplicates that differ by more than the tolerance.
    """

    shards: int
    rows: int
    duplicates: int
    damaged: dict[str, str]
    conflicts: tuple[Conflict, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damaged and not self.conflicts


def _require_store(location: object, names: Iterable[str]) -> None:
    """
    Check that a directory has files of a store.

    Raises:
        StoreError: It has none.
    """
    files = list(names)
    shards = [Path(file).with_suffix(MANIFEST_SUFFIX).name for file in files if file.endswith(SHARD_SUFFIX)]
    if not published_names([*files, *shards]) and not any(
        file.endswith((JOURNAL_SUFFIX, DAMAGED_SUFFIX)) or file.startswith(TEMPORARY_PREFIX) for file in files
    ):
        found = f"found {', '.join(sorted(files)[:3])}{', ...' if len(files) > 3 else ''}" if files else "it is empty"
        raise StoreError(
            f"{str(location)!r} is no store: expected shards or journals, {found}. Check the path, or fill a store "
            "there with `trl-refplug precompute`"
        )


def summarize(location: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> StoreSummary:
    """Read the manifests of a store, and only them."""
    folder = open_existing(location, cache_dir)
    with reading(location):
        present = set(folder.names())
        _require_store(location, present)
        names = published_names(present)
        folder.fetch([files_of(name)[0] for name in names])
    manifests, damaged = [], {}
    for name in names:
        manifest_file, shard_file = files_of(name)
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
    Read every byte of a store: check all checksums, and compare the rows that more than one writer scored.

    Args:
        location (`str` or `os.PathLike`): A directory or an fsspec URL.
        tolerance (`float`): Largest difference between two scorings of a token that is put down to rounding, in nats.
            Other batch shapes move bfloat16 log-probs by up to 6e-3, other devices by somewhat more.
        cache_dir (`str` or `os.PathLike`): Where copies of remote shards are kept.
    """
    folder = open_existing(location, cache_dir)
    catalogue = Catalogue(folder)
    with reading(location):
        _require_store(location, folder.names())
        damaged = catalogue.refresh()
    names = list(catalogue.manifests)
    conflicts = []
    duplicates = 0
    for number, shard in enumerate(catalogue.shards):
        _, first_shards, first_rows = catalogue.index.find(shard.keys)
        again = np.flatnonzero((first_shards != number) | (first_rows != np.arange(len(shard.keys))))
        duplicates += len(again)
        for row in again.tolist():
            first = int(first_shards[row])
            difference = _difference(catalogue.shards[first].row(int(first_rows[row])), shard.row(row))
            if difference > tolerance:
                conflicts.append(Conflict(shard.keys[row].tobytes().hex(), (names[first], names[number]), difference))
    return VerifyReport(
        shards=len(names),
        rows=len(catalogue.index),
        duplicates=duplicates,
        damaged={name: str(error) for name, error in damaged.items()},
        conflicts=tuple(conflicts),
    )


def _difference(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    if len(first) != len(second):
        return float("inf")
    return float(np.abs(first - second).max(initial=0.0))
