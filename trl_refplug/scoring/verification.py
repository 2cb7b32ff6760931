"""
Find out whether the packed answers of a model can be trusted, by comparing them with exact ones on a few rows.

These rows are put together from the tokens of the first rows that are to be scored. The rows themselves would not do:
if they have no prefix in common, a packed pass does the same as an exact one, and nothing is learned about sharing.
The rows that are put together always share prefixes, on two levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.modes import evaluation_mode
from trl_refplug.models.positions import batch_length_limit
from trl_refplug.models.tolerances import disagreement, tolerance_of
from trl_refplug.rows import Ints, PaddedRows, Row
from trl_refplug.runtime.memory import ran_out_of_memory
from trl_refplug.scoring.exact import exact_log_probs
from trl_refplug.scoring.packed import PackedScorer, describe_error


TOKENS = 1024
"""Most tokens, with padding, in all rows of the comparison together."""

FEWEST_TOKENS = 60
"""Number of tokens, with padding, in all rows of the smallest possible comparison together."""

SHIFT = 512
"""
By how many positions a row is shifted, if the model has that many, to see whether its log-probs change. With thousands
of positions, rounding alone would change them.
"""

SHIFT_TOLERANCES = 10
"""
How many times the tolerance the log-probs of a shifted row may differ. Its rotary embeddings are other numbers, which
are rounded differently.
"""

_ROWS = 10
_BRANCHES = 3


def verify(packed: PackedScorer, rows: Sequence[Ints]) -> str | None:
    """
    Compare packed with exact answers.

    This takes one exact and one packed forward pass over at most [`TOKENS`] tokens, or fewer where memory runs out.
    One of the rows is scored once more at later positions, where padding on its left would put it. If that changes its
    log-probs, `packed.absolute_positions` is set. Every rank makes the same number of passes, whatever its rows are.

    Args:
        packed ([`PackedScorer`]): Scores packed rows.
        rows (`Sequence[np.ndarray]`): Token ids of real rows. The rows of the comparison are made of them.

    Returns:
        `str` or `None`: Why packed answers cannot be trusted, as a phrase that completes "because of"; `None` if the
        answers agree.
    """
    tokens = max(FEWEST_TOKENS, min(TOKENS, packed.budget))
    while True:
        try:
            return _compare(packed, sharing_rows(rows, packed.config, tokens, packed.limit))
        except Exception as error:
            if not ran_out_of_memory(error):
                return describe_error(error)
            if packed.collective or tokens == FEWEST_TOKENS:
                raise
            tokens = max(FEWEST_TOKENS, tokens // 2)


def _compare(packed: PackedScorer, rows: list[Row]) -> str | None:
    padded = PaddedRows.flush_left(rows)
    with evaluation_mode(packed.model):
        exact = list(padded.values_by_row(exact_log_probs(packed.model, padded.to_batch(packed.device))))
    (pack,) = packed.plan(rows, None)
    scored = packed.score_pack(pack)
    if not packed.absolute_positions:
        # This comes after the packed pass, which has already failed if the model's table of positions is only as long
        # as its input. Such a model does not have the positions that are asked for here
        differences = (_shifted_log_probs(packed, padded.select([0])) - torch.from_numpy(exact[0])).abs()
        allowed = SHIFT_TOLERANCES * tolerance_of(scored.dtype).largest
        packed.absolute_positions = bool((differences > allowed).any())
    answers: Tensor = scored.log_probs.cpu()
    found = [answers[torch.from_numpy(answer)] for answer in pack.answers]
    expected = [torch.from_numpy(exact[index]) for index in pack.rows]
    return disagreement(torch.cat(found), torch.cat(expected), scored.dtype)


def _shifted_log_probs(packed: PackedScorer, row: PaddedRows) -> Tensor:
    """The log-probs that the exact call gives for a row whose positions begin later: float32 `[scored]`."""
    batch = row.to_batch(packed.device)
    positions = min(_positions(packed.config), batch_length_limit(causal_lm(packed.model)))
    start = int(max(0, min(SHIFT, positions - row.width)))
    position_ids = torch.arange(start, start + row.width, device=packed.device)[None]
    with evaluation_mode(packed.model):
        log_probs = exact_log_probs(packed.model, replace(batch, extras={"position_ids": position_ids}))
    return torch.from_numpy(*row.values_by_row(log_probs))


def _positions(config: Any) -> float:
    """The number of positions that the model has; infinity if its configuration does not tell."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or float("inf")


def sharing_rows(rows: Sequence[Ints], config: Any, tokens: int, limit: float = float("inf")) -> list[Row]:
    """
    Put ten rows together from the tokens of real rows.

    Nine of them have a prefix in common, in three groups of three that share a longer one. The tenth shares nothing.
    Completions are short, because an error where rows branch off shows in the first tokens after that.

    Args:
        rows (`Sequence[np.ndarray]`): Token ids of real rows. No row that is made is longer than the longest of these,
            if that has at least 6 tokens.
        config (`PretrainedConfig`): The configuration of the model.
        tokens (`int`): Most tokens in all ten rows together, padded to the longest; at least 60.
        limit (`float`): Most tokens in a row; at least 6.

    Returns:
        `list[Row]`: The ten rows.
    """
    # If a model takes a token's place in the pack for its position, the comparison should show it. The model must not
    # run out of positions before that, because a GPU does not recover from it. So the rows are kept short
    positions = _positions(config)
    real = max(6, max(map(len, rows), default=0))
    longest = int(min(tokens // _ROWS, real, limit, positions // 3))
    end = max(2, longest // 10)
    start = max(2, longest - 2 * end)

    by_length = sorted(rows, key=len, reverse=True)
    ids = np.concatenate([*by_length, np.arange(_BRANCHES)])[: tokens + _BRANCHES]
    different = list(dict.fromkeys([*ids[start:].tolist(), *range(_BRANCHES)]))[:_BRANCHES]
    used = 0

    def piece(size: int, first: int | None = None) -> Ints:
        nonlocal used
        taken = ids.take(np.arange(used, used + size), mode="wrap")
        used += size
        if first is not None:
            taken[0] = first
        return taken

    trunk = piece(start)
    branches = [piece(end, first) for first in different]
    lengths = (end, end, end - 1)
    made = [
        Row.completion(trunk, [*branch, *piece(size, first)])
        for branch in branches
        for size, first in zip(lengths, different, strict=True)
    ]
    other = piece(start, next(first for first in different if first != trunk[0]))
    return [*made, Row.completion(other, piece(end))]
