"""
A row: one sequence of tokens to score, without padding. This is plain numpy, and nothing here knows a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_refplug.errors import UnsupportedInputError


IGNORED = -100
"""The label of a token that is not scored."""

Ints = NDArray[np.int64]
"""Integers of any shape, such as token ids, labels or positions."""


@dataclass(frozen=True, eq=False)
class Row:
    """
    One token sequence without padding, and which of its tokens are scored.

    Args:
        input_ids (`np.ndarray`): int64 `[seq]`; any sequence of integers is converted.
        labels (`np.ndarray`): int64 `[seq]`; the token id where the token is scored, -100 elsewhere. The first token
            is never scored, whatever its label, because nothing predicts it.
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
        """Join a prompt, which is not scored, and a completion, every token of which is scored."""
        prompt, completion = np.asarray(prompt_ids, dtype=np.int64), np.asarray(completion_ids, dtype=np.int64)
        return cls(
            np.concatenate([prompt, completion]),
            np.concatenate([np.full(prompt.shape, IGNORED, np.int64), completion]),
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def scored(self) -> Ints:
        """The positions of the scored tokens in ascending order: int64 `[scored]`."""
        positions: Ints = np.flatnonzero(self.labels != IGNORED)
        return positions[positions > 0]


def check_labels(labels: Ints, vocab_size: int) -> None:
    """
    Refuse labels that are neither -100 nor a token id, which would be answered with another token's log-prob.

    Args:
        labels (`np.ndarray`): int64, of any shape.
        vocab_size (`int`): Number of token ids that the model knows.

    Raises:
        UnsupportedInputError: There is such a label.
    """
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))]
    if len(wrong):
        raise UnsupportedInputError(
            f"Found label {wrong[0]}, expected a token id below {vocab_size:,} (the model's vocabulary) where a token "
            f"is scored and {IGNORED} elsewhere."
        )


def unpad(input_ids: Ints, attention_mask: Ints, labels: Ints) -> tuple[list[Row], Ints]:
    """
    Cut the rows of a batch out of their padding, which may be on either side.

    Args:
        input_ids, attention_mask, labels (`np.ndarray`): `[batch, seq]`.

    Returns:
        `tuple[list[Row], np.ndarray]`: The rows, and the column at which each begins: int64 `[batch]`.

    Raises:
        ValueError: An attention mask has holes, or a token is scored that is padding or that only padding precedes.
            Such a row is not a plain token sequence: what a model answers for it depends on the padding.
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
