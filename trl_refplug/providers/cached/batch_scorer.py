"""Scoring many rows with a source that takes one batch at a time, on one rank or on several ranks in step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from trl_refplug.provider import ReferenceProvider
from trl_refplug.rows import PaddedRows, Row, Values


_BATCH_ROWS = 16
_WINDOW_BATCHES = 16


class BatchScorer:
    """
    Scores a stream of rows in padded batches.

    Args:
        source ([`ReferenceProvider`]): The provider that scores.
        device (`torch.device`): The device for the batches.
        any_rank (`Callable[[bool], bool]`, *optional*): Tells whether its argument is true on any rank. It is given if
            all ranks have to take part in each forward pass. A rank that has no rows left then goes on with a row
            whose answer is thrown away.
    """

    def __init__(
        self, source: ReferenceProvider, device: torch.device, any_rank: Callable[[bool], bool] | None = None
    ) -> None:
        self._source = source
        self._device = device
        self._any_rank = any_rank

    def score_passes(self, rows: Iterable[Row]) -> Iterator[list[tuple[int, Tensor]]]:
        """
        Yields:
            `list[tuple[int, Tensor]]`: For each row of one batch, its index in `rows` and the log-probabilities of its
            scored tokens, in order: float32 `[scored]` on the CPU.
        """
        batches = _batches(iter(rows))
        while True:
            batch = next(batches, None)
            if not (batch if self._any_rank is None else self._any_rank(batch is not None)):
                return
            if batch is None:
                self._score([Row.completion([0], [0])])
            else:
                values = self._score([row for _, row in batch])
                yield [(index, torch.from_numpy(found)) for (index, _), found in zip(batch, values, strict=True)]

    def _score(self, rows: Sequence[Row]) -> list[Values]:
        padded = PaddedRows.flush_left(rows)
        return list(padded.values_by_row(self._source.log_probs(padded.to_batch(self._device))))


def _batches(rows: Iterator[Row]) -> Iterator[list[tuple[int, Row]]]:
    """Batches of rows of similar length. Each row comes with its index in `rows`."""
    indexed = enumerate(rows)
    while window := list(islice(indexed, _WINDOW_BATCHES * _BATCH_ROWS)):
        window.sort(key=lambda item: len(item[1]))
        yield from (window[start : start + _BATCH_ROWS] for start in range(0, len(window), _BATCH_ROWS))
