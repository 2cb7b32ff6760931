"""Cutting batches into rows, giving the rows their keys in a store, and looking them up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trl_refplug.errors import UnsupportedInputError
from trl_refplug.provider import ModelTraits, ReferenceBatch
from trl_refplug.rows import IGNORED, Ints, PaddedRows, Row, Values
from trl_refplug.rows.planned import PlannedRows
from trl_refplug.store import LogProbStore, RowKey, ScoringFacts, tail_scored_keys


@dataclass(frozen=True)
class BatchRows:
    """
    The rows of one batch.

    Args:
        padded ([`PaddedRows`]): The rows, and where they are in the batch.
        offsets (`Sequence[int]`): The position of each row's first token if the model has absolute positions, so that
            log-probs depend on it; otherwise zeros.
    """

    padded: PaddedRows
    offsets: Sequence[int]

    def __len__(self) -> int:
        return len(self.padded)

    def keys(self, facts: ScoringFacts, indices: Sequence[int] | None = None) -> list[bytes]:
        """The keys of the rows with these indices; of all rows by default."""
        every = range(len(self)) if indices is None else indices
        rows = [(self.row(index), self.offsets[index]) for index in every]
        return [RowKey(facts, row.input_ids, row.scored, padding_offset=offset).digest() for row, offset in rows]

    def row(self, index: int) -> Row:
        return self.padded.rows[index]

    def padding_offset(self, index: int) -> int:
        """The position of the first token of row `index` if log-probs depend on it; otherwise 0."""
        return self.offsets[index]

    def scored_counts(self) -> Ints:
        """How many scored tokens each row has: int64 `[batch]`."""
        return np.array([len(row.scored) for row in self.padded.rows], np.int64)


@dataclass(frozen=True)
class TailScoredRows:
    """
    Rows in the form in which the trainer plans them. It has those methods of [`BatchRows`] that filling a store needs.
    """

    planned: PlannedRows

    def __len__(self) -> int:
        return len(self.planned)

    def keys(self, facts: ScoringFacts, indices: Sequence[int] | None = None) -> list[bytes]:
        """The keys of the rows with these indices; of all rows by default."""
        planned = self.planned
        if indices is None or 4 * len(indices) > len(self):  # making all keys at once is so much faster
            keys = tail_scored_keys(facts, planned.token_ids, planned.offsets.tolist(), planned.first_scored.tolist())
            return keys if indices is None else [keys[index] for index in indices]
        return [RowKey(facts, row.input_ids, row.scored).digest() for row in map(self.row, indices)]

    def row(self, index: int) -> Row:
        """A copy of row `index`, because it may be kept longer than the block."""
        ids = self.planned.token_ids[self.planned.offsets[index] : self.planned.offsets[index + 1]].copy()
        labels = ids.copy()
        labels[: self.planned.first_scored[index]] = IGNORED
        return Row(ids, labels)

    def padding_offset(self, index: int) -> int:
        """Always 0, because planned rows are not padded."""
        return 0

    def scored_counts(self) -> Ints:
        """How many scored tokens each row has: int64 `[rows]`."""
        counts: Ints = np.maximum(np.diff(self.planned.offsets) - self.planned.first_scored, 0)
        return counts


class RowKeys:
    """
    Cuts batches into rows that have keys, and looks them up in a store.

    Args:
        packed, exact ([`ScoringFacts`]): What goes into the keys of rows that were scored in bulk, and of rows that
            were scored in the trainer's own batches. Their values are the same but for rounding, so a row is a hit if
            the store has it under either key.
        model ([`ModelTraits`]): The traits of the reference's model.
    """

    def __init__(self, packed: ScoringFacts, exact: ScoringFacts, model: ModelTraits) -> None:
        self.packed = packed
        self.exact = exact
        self._absolute = model.absolute_positions
        self._length_limit = model.length_limit

    def rows_of_batch(self, batch: ReferenceBatch) -> BatchRows:
        """
        The rows of `batch`.

        Raises:
            UnsupportedInputError: They are not plain sequences of tokens.
        """
        if batch.extras or not batch.rows_sliceable:
            raise UnsupportedInputError(
                "ref_provider='cached' (what `precompute_ref_log_probs=True` means) is not supported for vision "
                "datasets: it stores rows of text, and this batch has further model inputs: "
                f"{', '.join(sorted(batch.extras))}. Use ref_provider='frozen' or 'adapter'."
            )
        self._check_length(batch.input_ids.shape[1])
        try:
            padded = PaddedRows.from_batch(batch)
        except ValueError as error:
            raise UnsupportedInputError(
                f"ref_provider='cached' stores rows that are plain token sequences; this batch has {error}. Use "
                "ref_provider='frozen' or 'adapter'."
            ) from None
        return BatchRows(padded, padded.lefts if self._absolute else [0] * len(padded))

    def rows_of_plan(self, planned: PlannedRows) -> TailScoredRows:
        """
        The same for rows as the trainer plans them, which need not be cut out of a batch.

        Raises:
            UnsupportedInputError: A row is so long that its log-probs depend on the other rows of its batch.
        """
        self._check_length(int(np.diff(planned.offsets).max(initial=0)))
        return TailScoredRows(planned)

    def _check_length(self, columns: int) -> None:
        if self._length_limit is not None and columns > self._length_limit:
            raise UnsupportedInputError(
                f"ref_provider='cached' stores what a row says by itself. This model's rotary embeddings change in "
                f"batches longer than {self._length_limit} tokens (this one has {columns}), so there its log-probs "
                "depend on other rows. Lower `max_length`, or use ref_provider='frozen' or 'adapter'."
            )

    def look_up(self, store: LogProbStore, batch: BatchRows) -> list[Values | None]:
        """The stored values of the rows of `batch`: float32 `[scored]` for each, `None` for those that are missing."""
        # Packed keys are always looked up first, so that all runs that read a store read the same bits.
        answer = store.lookup(batch.keys(self.packed))
        found = [answer[index] for index in range(len(batch))]
        missing = [index for index, values in enumerate(found) if values is None]
        if missing:
            answer = store.lookup(batch.keys(self.exact, missing))
            for line, index in enumerate(missing):
                # A row without scored tokens has no values, and is never stored.
                found[index] = answer[line] if len(batch.row(index).scored) else np.empty(0, np.float32)
        return found


def select_rows(batch: ReferenceBatch, indices: list[int]) -> ReferenceBatch:
    """The rows of a batch with these indices, with all columns of the batch. The batch must have no extras."""
    if len(indices) == len(batch.input_ids):
        return batch
    chosen: Any = torch.tensor(indices, device=batch.input_ids.device)
    return ReferenceBatch(batch.input_ids[chosen], batch.attention_mask[chosen], batch.labels[chosen])
