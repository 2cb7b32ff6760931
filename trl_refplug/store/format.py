"""
The two files of which a store has any number of pairs: a shard, which holds rows, and the manifest that describes it.

A shard is published at the moment its manifest appears. Both files are written once and never changed. Both have a
checksum, so that a reader either gets the bytes that were written or notices that they are damaged.
"""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from trl_refplug.errors import StoreVersionError
from trl_refplug.store.keys import KEY_BYTES


FORMAT_VERSION = 1
MANIFEST_SUFFIX = ".json"
SHARD_SUFFIX = ".arrow"

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("log_probs", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False),
    ]
)
_CHUNK_BYTES = 1 << 20
_PROVENANCE_PACKAGES = ("trl-refplug", "torch", "transformers", "trl", "peft", "numpy", "pyarrow")

# A file with any other name is not part of a store, whatever its suffix is.
_SHARD_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{16}")


def new_shard_name(now: datetime) -> str:
    """A unique name for a new shard. Names sort by the time of publication (UTC)."""
    return f"{now:%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:16]}"


def shard_file_names(name: str) -> tuple[str, str]:
    """The names of a shard's two files: the manifest and the rows."""
    return name + MANIFEST_SUFFIX, name + SHARD_SUFFIX


def published_shard_names(files: Iterable[str]) -> list[str]:
    """The names of the shards whose manifest is among `files`, oldest first."""
    names = (file.removesuffix(MANIFEST_SUFFIX) for file in files if file.endswith(MANIFEST_SUFFIX))
    return sorted(name for name in names if _SHARD_NAME.fullmatch(name))


class DamagedFileError(Exception):
    """A file differs from what was published under its name. The message says how."""


@dataclass(frozen=True)
class Manifest:
    """
    What a shard contains, and the checksum that shows whether it is intact.

    Args:
        name (`str`): Name of the shard and of the manifest, without suffix. Sorts by time of publication.
        rows (`int`): Number of rows.
        tokens (`int`): Number of log-probs.
        size (`int`): Bytes of the shard's file.
        xxh3_128 (`str`): Checksum of the shard's file, in hexadecimal.
        created (`str`): When it was published, UTC, ISO 8601.
        provenance (`Mapping[str, Any]`): Where the rows come from: the identity of the reference, package versions and
            so on. None of it is part of a key.
        format_version (`int`): Format version of both files.
    """

    name: str
    rows: int
    tokens: int
    size: int
    xxh3_128: str
    created: str
    provenance: Mapping[str, Any]
    format_version: int = FORMAT_VERSION

    def encode(self) -> bytes:
        """The content of the manifest file. Raises `TypeError` or `ValueError` if the provenance is not JSON."""
        return _envelope(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """
        The inverse of [`encode`].

        Raises:
            [`StoreVersionError`]: The file is intact and has a newer format version.
            [`DamagedFileError`]: The file differs from what was published.
        """
        # The envelope is the same in all versions of the format, so that a newer file is not taken for a damaged one.
        try:
            body = json.loads(data)["manifest"]
            intact = _envelope(body) == data
        except (ValueError, TypeError, LookupError, RecursionError):
            intact = False
        if not intact:
            raise DamagedFileError("its manifest does not match its own checksum")
        version = body["format_version"]
        if version > FORMAT_VERSION:
            raise StoreVersionError(
                f"shard {body['name']} has format version {version}, this release of trl-refplug reads up to version "
                f"{FORMAT_VERSION}. Upgrade trl-refplug, or use another path"
            )
        return cls(**body)


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages that log-probs depend on, for the provenance in a manifest."""
    found = {"python": sys.version.split()[0]}
    for package in _PROVENANCE_PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _envelope(body: Any) -> bytes:
    """Encode `body` as canonical JSON together with its checksum. Equal bodies give equal bytes."""
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    checksum = xxhash.xxh3_128_hexdigest(text.encode())
    return f'{{"manifest": {text}, "xxh3_128": "{checksum}"}}\n'.encode()


@dataclass(frozen=True)
class Shard:
    """
    A memory-mapped shard whose checksum was correct.

    Args:
        keys (`NDArray[np.uint64]`): `[rows, 2]`.
        offsets (`NDArray[np.int32]`): `[rows + 1]`; row `i` is `values[offsets[i] : offsets[i + 1]]`.
        values (`NDArray[np.float32]`): `[tokens]`, the log-probs of all rows, in nats.
    """

    keys: NDArray[np.uint64]
    offsets: NDArray[np.int32]
    values: NDArray[np.float32]

    def row(self, number: int) -> NDArray[np.float32]:
        """Row `number` as a view, float32 `[tokens]`."""
        bounds = self.offsets.data  # indexing a memoryview is several times faster than indexing a numpy array
        return self.values[bounds[number] : bounds[number + 1]]


def encode_shard(keys: Sequence[bytes], rows: Sequence[NDArray[np.float32]]) -> bytes:
    """The content of a shard's file, an Arrow IPC file with one record batch. There has to be at least one row."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    # This uses buffers because pa.array() would import pandas to convert numpy arrays.
    values = pa.Array.from_buffers(pa.float32(), int(offsets[-1]), [None, pa.py_buffer(np.concatenate(rows))])
    columns = [
        pa.Array.from_buffers(_SCHEMA.field(0).type, len(keys), [None, pa.py_buffer(b"".join(keys))]),
        pa.Array.from_buffers(_SCHEMA.field(1).type, len(rows), [None, pa.py_buffer(offsets)], children=[values]),
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def open_shard(path: Path, manifest: Manifest) -> Shard:
    """
    Check all of a shard's file against its manifest, and map it into memory.

    Raises:
        [`DamagedFileError`]: Its bytes are not those that were published.
        `OSError`: It does not exist or cannot be read.
    """
    size, checksum = _checksum(path)
    if size != manifest.size:
        raise DamagedFileError(f"it has {size} bytes, its manifest says {manifest.size}")
    if checksum != manifest.xxh3_128:
        raise DamagedFileError(f"its checksum is {checksum}, its manifest says {manifest.xxh3_128}")
    with pa.memory_map(os.fspath(path)) as file:  # closes the file; the mapping lives as long as the arrays
        batch = pa.ipc.open_file(file).get_batch(0)
    # This uses buffers because to_numpy() would import pandas, which takes 30 MB and as long as a million rows.
    _, keys = batch.column(0).buffers()
    _, offsets, _, values = batch.column(1).buffers()
    return Shard(
        keys=np.frombuffer(keys, "<u8", count=2 * manifest.rows).reshape(-1, 2),
        offsets=np.frombuffer(offsets, "<i4", count=manifest.rows + 1),
        values=np.frombuffer(values, "<f4", count=manifest.tokens),
    )


def _checksum(path: Path) -> tuple[int, str]:
    # This reads the file rather than the mapping. If the file shrinks meanwhile, that is a short read and no SIGBUS,
    # and checking a large store does not count as memory of this process.
    digest, size, chunk = xxhash.xxh3_128(), 0, memoryview(bytearray(_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            size += count
    return size, digest.hexdigest()
