"""The published part of a store: its intact shards and the index of their rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trl_refplug.store.folder import Folder
from trl_refplug.store.format import DamagedFileError, Manifest, Shard, files_of, open_shard, published_names
from trl_refplug.store.index import SortedIndex


class Catalogue:
    """All shards of a folder that are intact, each checked when it is opened."""

    def __init__(self, folder: Folder) -> None:
        self.index = SortedIndex()
        self.shards: list[Shard] = []
        self.manifests: dict[str, Manifest] = {}
        """By name, in the order of `shards`."""
        self._damaged: set[str] = set()
        self._folder = folder

    def refresh(self) -> dict[str, Exception]:
        """Open the shards that are new in the folder, oldest first. Returns those that cannot be used, and why."""
        present = set(self._folder.names())
        names = [name for name in published_names(present) if name not in self.manifests and name not in self._damaged]
        self._folder.fetch([file for name in names for file in files_of(name) if file in present])
        return self.add(names)

    def add(self, names: Sequence[str]) -> dict[str, Exception]:
        """Open these shards. Returns those that cannot be used, and why."""
        opened: dict[str, tuple[Manifest, Shard]] = {}
        damaged: dict[str, Exception] = {}
        for name in names:
            try:
                opened[name] = self._open(name)
            except (DamagedFileError, OSError) as error:
                damaged[name] = error
        # Only now, so that an exception above leaves no shard listed but not indexed.
        first = len(self.shards)
        self.index.add([(first + i, shard.keys) for i, (_, shard) in enumerate(opened.values())])
        self.shards += [shard for _, shard in opened.values()]
        self.manifests.update({name: manifest for name, (manifest, _) in opened.items()})
        self._damaged.update(damaged)
        return damaged

    def rows(self, keys: NDArray[np.uint64]) -> list[NDArray[np.float32] | None]:
        """The rows with these keys, uint64 `[keys, 2]`: views of mapped files, `None` where there is no such row."""
        found, shards, rows = (column.tolist() for column in self.index.find(keys))
        opened = self.shards
        return [
            opened[shard].row(row) if there else None for there, shard, row in zip(found, shards, rows, strict=True)
        ]

    def _open(self, name: str) -> tuple[Manifest, Shard]:
        try:
            return self._read(name)
        except DamagedFileError:
            # A copy in the cache may be damaged where the original is not.
            if not self._folder.drop_copies(files_of(name)):
                raise
            self._folder.fetch(files_of(name))
            return self._read(name)

    def _read(self, name: str) -> tuple[Manifest, Shard]:
        manifest_file, shard_file = (self._folder.directory / file for file in files_of(name))
        manifest = Manifest.decode(manifest_file.read_bytes())
        return manifest, open_shard(shard_file, manifest)
