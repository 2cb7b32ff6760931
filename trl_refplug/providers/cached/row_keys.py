"""From a batch to the keys of its rows, and from stored rows back to the shape of the batch."""

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
        padded ([`PaddedRows`]): One a row of the batch.
        offsets (`Sequence[int]`): Position of each first token where absolute positions make that matter, else 0.
    """

    padded: PaddedRows
    offsets: Sequence[int]

    def __len__(self) -> int:
        return len(self.padded)

    def keys(self, facts: ScoringFacts, indices: Sequence[int] | None = None) -> list[bytes]:
        """The keys of some rows, of all by default."""
        every = range(len(self)) if indices is None else indices
        rows = [(self.row(index), self.offsets[index]) for index in every]
        return [RowKey(facts, row.input_ids, row.scored, padding_offset=offset).digest() for row, offset in rows]

    def row(self, index: int) -> Row:
        return self.padded.rows[index]

    def padding_offset(self, index: int) -> int:
        """Position of the first token of row `index`, where absolute positions make that matter."""
        return self.offsets[index]

    def scored_counts(self) -> Ints:
        """`[batch]`, how many."""
        return np.array([len(row.scored) for row in self.padded.rows], np.int64)


@dataclass(frozen=True)
class TailScoredRows:
    """Rows as the trainer plans them, with the interface of [`BatchRows`] as far as filling a store needs it."""

    planned: PlannedRows

    def __len__(self) -> int:
        return len(self.planned)

    def keys(self, facts: ScoringFacts, indices: Sequence[int] | None = None) -> list[bytes]:
        """The keys of some rows, of all by default."""
        planned = self.planned
        if indices is None or 4 * len(indices) > len(self):  # all at once are that much faster
            keys = tail_scored_keys(facts, planned.token_ids, planned.offsets.tolist(), planned.first_scored.tolist())
            return keys if indices is None else [keys[index] for index in indices]
        return [RowKey(facts, row.input_ids, row.scored).digest() for row in map(self.row, indices)]

    def row(self, index: int) -> Row:
        """A copy of row `index`: it may outlive the block."""
        ids = self.planned.token_ids[self.planned.offsets[index] : self.planned.offsets[index + 1]].copy()
        labels = ids.copy()
        labels[: self.planned.first_scored[index]] = IGNORED
        return Row(ids, labels)

    def padding_offset(self, index: int) -> int:
        """Rows as they are planned are not padded."""
        return 0

    def scored_counts(self) -> Ints:
        """`[rows]`, how many."""
        counts: Ints = np.maximum(np.diff(self.planned.offsets) - self.planned.first_scored, 0)
        return counts


class RowKeys:
    """
    Cuts batches into rows that have keys.

    Args:
        packed, exact ([`ScoringFacts`]): Of rows scored in bulk and of rows scored in the trainer's own batches. They
            agree within rounding, so a row under either key is a hit.
        model ([`ModelTraits`]): Of the reference.
    """

    def __init__(self, packed: ScoringFacts, exact: ScoringFacts, model: ModelTraits) -> None:
        self.packed = packed
        self.exact = exact
        self._absolute = model.absolute_positions
        self._length_limit = model.length_limit

    def of(self, batch: ReferenceBatch) -> BatchRows:
        """
        The rows of `batch`.

        Raises:
            UnsupportedInputError: They are not plain token sequences.
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

    def of_planned(self, planned: PlannedRows) -> TailScoredRows:
        """
        The same for rows that are cut already.

        Raises:
            UnsupportedInputError: One is so long that its log-probs depend on the rows beside it.
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

    def find(self, store: LogProbStore, batch: BatchRows) -> list[Values | None]:
        """What the store has of `batch`: float32 `[scored]` for each row, `None` for those it misses."""
        # Always in this order, so that all runs that read one store read the same bits.
        answer = store.lookup(batch.keys(self.packed))
        found = [answer[index] for index in range(len(batch))]
        missing = [index for index, values in enumerate(found) if values is None]
        if missing:
            answer = store.lookup(batch.keys(self.exact, missing))
            for line, index in enumerate(missing):
                # What has no scored token has nothing to be stored
                found[index] = answer[line] if len(batch.row(index).scored) else np.empty(0, np.float32)
        return found


def select(batch: ReferenceBatch, indices: list[int]) -> ReferenceBatch:
    """Some rows of a batch without extras, in its own columns."""
    if len(indices) == len(batch.input_ids):
        return batch
    chosen: Any = torch.tensor(indices, device=batch.input_ids.device)
    return ReferenceBatch(batch.input_ids[chosen], batch.attention_mask[chosen], batch.labels[chosen])
