"""The published shards of a store, and looking up rows in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trl_refplug.store.folder import Folder
from trl_refplug.store.format import (
    DamagedFileError,
    Manifest,
    Shard,
    open_shard,
    published_shard_names,
    shard_file_names,
)
from trl_refplug.store.index import SortedIndex


class PublishedShards:
    """The published shards of a folder. Each is checked when it is opened, and damaged ones are left out."""

    def __init__(self, folder: Folder) -> None:
        self.index = SortedIndex()
        self.shards: list[Shard] = []
        self.manifests: dict[str, Manifest] = {}
        """The manifest of each shard by the shard's name, in the order of `shards`."""
        self._damaged: set[str] = set()
        self._folder = folder

    def refresh(self) -> dict[str, Exception]:
        """Open the shards that are new in the folder, oldest first. Returns the damaged ones with the reason."""
        present = set(self._folder.list_files())
        names = [
            name for name in published_shard_names(present) if name not in self.manifests and name not in self._damaged
        ]
        self._folder.fetch([file for name in names for file in shard_file_names(name) if file in present])
        return self.add(names)

    def add(self, names: Sequence[str]) -> dict[str, Exception]:
        """Open the shards with these names. Returns the damaged ones with the reason."""
        opened: dict[str, tuple[Manifest, Shard]] = {}
        damaged: dict[str, Exception] = {}
        for name in names:
            try:
                opened[name] = self._open(name)
            except (DamagedFileError, OSError) as error:
                damaged[name] = error
        # This comes last, so that an exception above cannot leave a shard that is listed but not indexed.
        first = len(self.shards)
        self.index.add([(first + i, shard.keys) for i, (_, shard) in enumerate(opened.values())])
        self.shards += [shard for _, shard in opened.values()]
        self.manifests.update({name: manifest for name, (manifest, _) in opened.items()})
        self._damaged.update(damaged)
        return damaged

    def rows(self, keys: NDArray[np.uint64]) -> list[NDArray[np.float32] | None]:
        """
        Look up rows by their keys, uint64 `[keys, 2]`. Each is a view of a memory-mapped file, or `None` if there is
        no such row.
        """
        found, shards, rows = (column.tolist() for column in self.index.find(keys))
        opened = self.shards
        return [
            opened[shard].row(row) if there else None for there, shard, row in zip(found, shards, rows, strict=True)
        ]

    def _open(self, name: str) -> tuple[Manifest, Shard]:
        try:
            return self._read(name)
        except DamagedFileError:
            # Of a remote store, the copy in the local cache may be damaged although the original is intact.
            if not self._folder.drop_copies(shard_file_names(name)):
                raise
            self._folder.fetch(shard_file_names(name))
            return self._read(name)

    def _read(self, name: str) -> tuple[Manifest, Shard]:
        manifest_file, shard_file = (self._folder.directory / file for file in shard_file_names(name))
        manifest = Manifest.decode(manifest_file.read_bytes())
        return manifest, open_shard(shard_file, manifest)
