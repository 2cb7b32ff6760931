"""Rows whose values can be checked, and processes that write them."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from trl_refplug.store import LogProbStore


def key_of(number: int) -> bytes:
    return xxhash.xxh3_128_digest(number.to_bytes(8, "little"))


def row_of(number: int) -> np.ndarray:
    """The row that belongs to `number`. It has 0 to 40 log-probs."""
    return -np.random.default_rng(number).random(number % 41, dtype=np.float32)


def fill(store: LogProbStore, numbers: Sequence[int]) -> None:
    store.put([key_of(number) for number in numbers], [row_of(number) for number in numbers])


def right_rows(store: LogProbStore, numbers: Sequence[int]) -> set[int]:
    """The `numbers` whose rows the store has. Fails if the values of a row are wrong."""
    answer = store.lookup([key_of(number) for number in numbers])
    found = {number: row for number, row in zip(numbers, answer, strict=True) if row is not None}
    for number, row in found.items():
        assert np.array_equal(row, row_of(number)), f"row {number} is wrong"
    return set(found)


def files_of(path: Path, suffix: str) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.name.endswith(suffix))


def write_all(location: str, numbers: range, seed: int, options: dict[str, float]) -> None:
    """Fill a store with `numbers` in micro-batches, in a random order."""
    order = list(numbers)
    random.Random(seed).shuffle(order)
    with LogProbStore(location, mode="a", **options) as store:
        for i in range(0, len(order), 5):
            fill(store, order[i : i + 5])


def write_until_killed(location: str, first: int, acknowledgements: str) -> None:
    """Put micro-batches of five without end, two per shard. Append the numbers of the rows that were put to a file."""
    with LogProbStore(location, mode="a", publish_rows=10) as store, open(acknowledgements, "ab", buffering=0) as log:
        number = first
        while True:
            fill(store, range(number, number + 5))
            os.write(log.fileno(), b"".join(n.to_bytes(8, "little") for n in range(number, number + 5)))
            number += 5
