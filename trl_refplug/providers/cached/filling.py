"""Scoring all the rows that a store does not have, many at a time, beside other processes that do the same."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from trl_refplug.errors import (
    UnsupportedInputError,
)
from trl_refplug.provider import (
    BulkScorer,
    ReferenceProvider,
    ScoresInBulk,
)
from trl_refplug.providers.cached.batch_scorer import BatchScorer
from trl_refplug.providers.cached.missing_rows import MissingRows, RowBlock
from trl_refplug.providers.cached.row_keys import RowKeys
from trl_refplug.providers.cached.sharing import SharedWork
from trl_refplug.rows import Row
from trl_refplug.store import LogProbStore


logger = logging.getLogger("trl_refplug")

_WINDOWS = 64  # the rows of a run are divided into this many windows, so that several processes can share them
_FEWEST_ROWS, _MOST_ROWS = 8, 1024  # but a window has at least and at most this many rows


def fill(
    store: LogProbStore,
    planned: Callable[[], Iterable[RowBlock]],
    keys: RowKeys,
    found: MissingRows,
    source: ReferenceProvider,
    device: torch.device,
    *,
    progress: bool,
    any_rank: Callable[[bool], bool] | None = None,
) -> None:
    """
    Score this rank's part of the missing rows. They are stored while scoring goes on.

    Args:
        planned (`Callable`): Gives all rows of the run, in blocks. It can be called several times.
        device (`torch.device`): The device of the trainer.
        any_rank (`Callable[[bool], bool]`, *optional*): Tells whether its argument is true on any rank. It is given if
            the source is sharded. Every rank then makes as many forward passes as the others, on padded batches.

    Raises:
        StoreWriteError: Rows could not be published. Those that were published before are kept.
    """
    store.ensure_room(found.tokens)
    bar = tqdm(total=len(found.mine), desc="Reference log-probs", unit="row", disable=not progress)
    filling = _Filling(store, keys, found, bar)
    started = time.perf_counter()
    with bar:
        if any_rank is not None:
            filling.score(filling.all_rows(planned()), BatchScorer(source, device, any_rank), bulk=False)
        elif isinstance(source, ScoresInBulk):
            with source.bulk_scorer() as scorer:
                filling.score_windows(planned, scorer, bulk=True)
        else:
            filling.score_windows(planned, BatchScorer(source, device), bulk=False)
    store.flush()
    seconds = time.perf_counter() - started
    line = (
        f"Scored {filling.rows:,} rows ({filling.tokens:,} log-probs) into {store.location} in {seconds:,.1f} s, "
        f"{filling.rows / seconds:,.0f} rows/s; {found.rows - len(found.missing):,} of {found.rows:,} were there"
    )
    if others := len(found.mine) - filling.rows:
        line += f", {others:,} were scored by other processes meanwhile"
    logger.info("%s.", line)
    if progress:
        tqdm.write(f"{line}.", file=sys.stderr)


class _Filling:
    """
    The rows that are still to be scored.

    Attributes:
        rows (`int`), tokens (`int`): How many rows were scored so far, and how many log-probs they have.
    """

    def __init__(self, store: LogProbStore, keys: RowKeys, found: MissingRows, bar: Any) -> None:
        self.rows = self.tokens = 0
        self._store = store
        self._keys = keys
        self._pending = set(found.mine)
        self._window = min(max(found.rows // _WINDOWS, _FEWEST_ROWS), _MOST_ROWS)
        self._bar = bar

    def score_windows(self, planned: Callable[[], Iterable[RowBlock]], scorer: BulkScorer, *, bulk: bool) -> None:
        """Score the rows window by window. Before each window, look at what other processes have stored."""
        work = SharedWork(self._store)
        turn = 0
        while self._pending:
            for block in planned():
                keys = block.keys(self._keys.packed)
                for start in range(0, len(keys), self._window):
                    indices = [
                        i for i in range(start, min(start + self._window, len(keys))) if keys[i] in self._pending
                    ]
                    if indices and work.turn(keys[start]) <= turn:
                        work.look()
                        self.score(self._rows(block, keys, indices), scorer, bulk=bulk)
            turn += 1

    def all_rows(self, blocks: Iterable[RowBlock]) -> Iterator[tuple[RowBlock, int, bytes]]:
        """Every row that is still to be scored, with its block, its index in the block, and its key."""
        for block in blocks:
            keys = block.keys(self._keys.packed)
            yield from self._rows(block, keys, range(len(keys)))

    def _rows(
        self, block: RowBlock, keys: Sequence[bytes], indices: Iterable[int]
    ) -> Iterator[tuple[RowBlock, int, bytes]]:
        there = self._store.contains(keys)  # looked up again: other processes fill the store, too
        for index in indices:
            if keys[index] not in self._pending:
                continue
            self._pending.discard(keys[index])
            if there[index]:
                self._bar.update()
                continue
            if block.padding_offset(index):
                raise UnsupportedInputError(
                    "fill='ahead' cannot score rows that are padded on the left for a model with absolute positions: "
                    "their log-probs depend on the padding. Pad on the right, or use fill='lazy'."
                )
            yield block, index, keys[index]

    def score(self, rows: Iterator[tuple[RowBlock, int, bytes]], scorer: BulkScorer, *, bulk: bool) -> None:
        """Score rows, and store the answers of each forward pass as soon as it is done."""
        sent: dict[int, bytes] = {}

        def unpadded() -> Iterator[Row]:
            for number, (block, index, key) in enumerate(rows):
                sent[number] = key if bulk else block.keys(self._keys.exact, [index])[0]
                yield block.row(index)

        for answers in scorer.score_passes(unpadded()):
            # They are stored after each pass, so that a process that is killed loses no more than one pass.
            self._store.put([sent.pop(number) for number, _ in answers], [values.numpy() for _, values in answers])
            self.rows += len(answers)
            self.tokens += sum(len(values) for _, values in answers)
            self._bar.update(len(answers))
