"""
Rows to score, free of padding. Plain numpy: nothing here knows a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_refplug.errors import UnsupportedInputError


IGNORED = -100
"""Label of a token that is not scored."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Row:
    """
    One unpadded token sequence and what to score in it.

    Args:
        input_ids (`np.ndarray`): int64 `[seq]`; any sequence of integers is converted.
        labels (`np.ndarray`): int64 `[seq]`; the token id where it is scored, -100 elsewhere. The label of the first
            token is never scored: nothing predicts it.
    """

    input_ids: Ints
    labels: Ints

    def __post_init__(self) -> None:
        for name in ("input_ids", "labels"):
            value: Any = getattr(self, name)
            object.__setattr__(self, name, np.asarray(value, dtype=np.int64))
        if self.input_ids.ndim != 1 or self.input_ids.shape != self.labels.shape:
            raise ValueError(
                "A row has one label per token, both one-dimensional; found input_ids of shape "
                f"{self.input_ids.shape} and labels of shape {self.labels.shape}."
            )

    @classmethod
    def completion(cls, prompt_ids: Any, completion_ids: Any) -> Row:
        """A prompt, not scored, followed by a completion, all of which is scored."""
        prompt, completion = np.asarray(prompt_ids, dtype=np.int64), np.asarray(completion_ids, dtype=np.int64)
        return cls(
            np.concatenate([prompt, completion]),
            np.concatenate([np.full(prompt.shape, IGNORED, np.int64), completion]),
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def scored(self) -> Ints:
        """Positions whose token is scored, ascending: int64 `[scored]`."""
        positions: Ints = np.flatnonzero(self.labels != IGNORED)
        return positions[positions > 0]


def check_labels(labels: Ints, vocab_size: int) -> None:
    """
    Raises:
        UnsupportedInputError: A label is neither -100 nor a token id. Its log-prob would be another token's.
    """
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))]
    if len(wrong):
        raise UnsupportedInputError(
            f"Found label {wrong[0]}, expected a token id below {vocab_size:,} (the model's vocabulary) where a token "
            f"is scored and {IGNORED} elsewhere."
        )


def rows_of(input_ids: Ints, attention_mask: Ints, labels: Ints) -> tuple[list[Row], Ints]:
    """
    Cut the rows of a padded batch out of their padding, whichever side it is on.

    Args:
        input_ids, attention_mask, labels (`np.ndarray`): `[batch, seq]`.

    Returns:
        The rows, and the column at which each begins: int64 `[batch]`.

    Raises:
        ValueError: A mask has holes, or a scored token is padding or is only preceded by padding. Such a row is not a
            plain token sequence, and what a model answers for it depends on the padding.
    """
    real = attention_mask != 0
    lengths = real.sum(1)
    starts: Ints = np.where(lengths > 0, real.argmax(1), 0).astype(np.int64)
    ends = starts + lengths
    columns = np.arange(input_ids.shape[1])
    inside = (columns >= starts[:, None]) & (columns < ends[:, None])
    if (inside != real).any():
        raise ValueError("attention masks with holes inside a row")
    scored = labels != IGNORED
    scored[:, :1] = False
    if (scored & ~(real & (columns > starts[:, None]))).any():
        raise ValueError("scored tokens that are padding or are preceded by padding only")
    rows = [
        Row(input_ids[row, start:end], labels[row, start:end])
        for row, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    return rows, starts
