"""
The rows of a batch without their padding, together with everything that is needed to restore the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trl_refplug.provider import ReferenceBatch
from trl_refplug.rows.row import IGNORED, Row, unpad


Values = NDArray[np.float32]
"""The log-probs of a row's scored tokens, in order: float32 `[scored]`."""


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """
    Rows, and the padding that they had in a batch.

    Args:
        rows (`Sequence[Row]`): The rows without padding.
        lefts (`Sequence[int]`): For each row, the number of padding tokens before it.
        width (`int`): Number of tokens of every row with its padding, the `seq` of the batch.
        padding_id (`int`): The token id that stands in the padding. Attention masks it, but in a mixture of experts
            padding tokens are still routed to experts, so the id can matter.
    """

    rows: Sequence[Row]
    lefts: Sequence[int]
    width: int
    padding_id: int = 0

    @classmethod
    def from_batch(cls, batch: ReferenceBatch, *, own_labels: bool = True) -> PaddedRows:
        """
        Take the rows of a batch of text out of their padding.

        Args:
            batch ([`ReferenceBatch`]): Rows that are padded on either side.
            own_labels (`bool`): Require that the label of every scored token is the token itself. Then it is enough to
                know which tokens are scored, as the keys of a store and the requests to a server do.

        Raises:
            ValueError: The rows are not plain token sequences. The text completes "this batch has".
        """
        if batch.extras or not batch.rows_sliceable:
            raise ValueError(f"model inputs beyond token ids ({', '.join(sorted(batch.extras)) or 'not by row'})")
        ids, mask, labels = (t.cpu().numpy() for t in (batch.input_ids, batch.attention_mask, batch.labels))
        rows, starts = unpad(ids, mask, labels)
        if own_labels and ((labels != IGNORED) & (labels != ids))[:, 1:].any():
            raise ValueError("labels that are neither -100 nor the token at their place")
        padding = ids[mask == 0]
        return cls(rows, starts.tolist(), ids.shape[1], int(padding[0]) if len(padding) else 0)

    @classmethod
    def flush_left(cls, rows: Sequence[Row]) -> PaddedRows:
        """Give rows as little padding as possible, all of it on the right."""
        return cls(rows, [0] * len(rows), max(map(len, rows), default=0))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows together, without padding."""
        return sum(map(len, self.rows))

    def select(self, indices: Sequence[int]) -> PaddedRows:
        """The rows at `indices`, each with the padding that it has here."""
        chosen, lefts = [self.rows[i] for i in indices], [self.lefts[i] for i in indices]
        return PaddedRows(chosen, lefts, self.width, self.padding_id)

    def to_batch(self, device: torch.device | str = "cpu") -> ReferenceBatch:
        """The rows with their padding. This undoes `from_batch`, except that all tensors are int64."""
        shape = (len(self), self.width)
        ids, mask = np.full(shape, self.padding_id, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        for number, (row, left) in enumerate(zip(self.rows, self.lefts, strict=True)):
            columns = slice(left, left + len(row))
            ids[number, columns], mask[number, columns], labels[number, columns] = row.input_ids, 1, row.labels
        input_ids, attention_mask, shown = (torch.from_numpy(table).to(device) for table in (ids, mask, labels))
        return ReferenceBatch(input_ids, attention_mask, shown)

    def values_by_row(self, log_probs: torch.Tensor) -> Iterator[Values]:
        """Take the values of each row's scored tokens out of an answer to the batch, `[batch, width - 1]`."""
        table = log_probs.float().cpu().numpy()
        for line, row, left in zip(table, self.rows, self.lefts, strict=True):
            yield line[left + row.scored - 1]

    def to_log_probs(self, values: Sequence[Values | None]) -> torch.Tensor:
        """
        Put the values of each row into an answer to the batch. This undoes [`values_by_row`].

        Args:
            values (`Sequence[Values | None]`): One entry per row; `None` leaves the row at zero.

        Returns:
            `Tensor`: float32 `[batch, width - 1]` on the CPU, zero wherever no token is scored.
        """
        table = np.zeros((len(self), max(self.width - 1, 0)), np.float32)
        for line, row, left, scored in zip(table, self.rows, self.lefts, values, strict=True):
            if scored is not None:
                line[left + row.scored - 1] = scored
        return torch.from_numpy(table)
