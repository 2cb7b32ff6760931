"""
The rows of a batch, free of their padding but with all it takes to restore it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trl_refplug.provider import ReferenceBatch
from trl_refplug.rows.row import IGNORED, Row, rows_of


Values = NDArray[np.float32]
"""The log-probs of a row's scored tokens, in order: float32 `[scored]`."""


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """
    Args:
        rows (`Sequence[Row]`): Unpadded rows.
        lefts (`Sequence[int]`): How many padding tokens come before each row.
        width (`int`): Tokens of a padded row.
        padding_id (`int`): The token that pads: masked, but experts of a mixture are still loaded by it.
    """

    rows: Sequence[Row]
    lefts: Sequence[int]
    width: int
    padding_id: int = 0

    @classmethod
    def of(cls, batch: ReferenceBatch, *, own_labels: bool = True) -> PaddedRows:
        """
        The rows of a batch of text.

        Args:
            own_labels (`bool`): Whether a token can be scored as itself only, so that which are scored says it all.

        Raises:
            ValueError: They are not plain token sequences. The text completes "this batch has".
        """
        if batch.extras or not batch.rows_sliceable:
            raise ValueError(f"model inputs beyond token ids ({', '.join(sorted(batch.extras)) or 'not by row'})")
        ids, mask, labels = (t.cpu().numpy() for t in (batch.input_ids, batch.attention_mask, batch.labels))
        rows, starts = rows_of(ids, mask, labels)
        if own_labels and ((labels != IGNORED) & (labels != ids))[:, 1:].any():
            raise ValueError("labels that are neither -100 nor the token at their place")
        padding = ids[mask == 0]
        return cls(rows, starts.tolist(), ids.shape[1], int(padding[0]) if len(padding) else 0)

    @classmethod
    def flush_left(cls, rows: Sequence[Row]) -> PaddedRows:
        """Rows that are padded on the right, by as little as possible."""
        return cls(rows, [0] * len(rows), max(map(len, rows), default=0))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(map(len, self.rows))

    def take(self, indices: Sequence[int]) -> PaddedRows:
        """Some of the rows, in the padding that they have."""
        chosen, lefts = [self.rows[i] for i in indices], [self.lefts[i] for i in indices]
        return PaddedRows(chosen, lefts, self.width, self.padding_id)

    def batch(self, device: torch.device | str = "cpu") -> ReferenceBatch:
        """The rows in their padding: the very tensors that `of` was given, up to integer types."""
        shape = (len(self), self.width)
        ids, mask = np.full(shape, self.padding_id, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        for number, (row, left) in enumerate(zip(self.rows, self.lefts, strict=True)):
            columns = slice(left, left + len(row))
            ids[number, columns], mask[number, columns], labels[number, columns] = row.input_ids, 1, row.labels
        input_ids, attention_mask, shown = (torch.from_numpy(table).to(device) for table in (ids, mask, labels))
        return ReferenceBatch(input_ids, attention_mask, shown)

    def gather(self, log_probs: torch.Tensor) -> Iterator[Values]:
        """The values of each row from float32 `[batch, width - 1]`."""
        table = log_probs.float().cpu().numpy()
        for line, row, left in zip(table, self.rows, self.lefts, strict=True):
            yield line[left + row.scored - 1]

    def place(self, values: Sequence[Values | None]) -> torch.Tensor:
        """
        The inverse of `gather`: float32 `[batch, width - 1]` on the CPU, zero where nothing is scored and in rows
        whose values are `None`.
        """
        table = np.zeros((len(self), max(self.width - 1, 0)), np.float32)
        for line, row, left, scored in zip(table, self.rows, self.lefts, values, strict=True):
            if scored is not None:
                line[left + row.scored - 1] = scored
        return torch.from_numpy(table)
