"""
Whether a model's packed answers can be trusted: both ways to score are compared on rows made for that.

They are made of the first rows asked for. Those as they are would not do: where they have no prefix in common, a
packed pass is the exact one, and nothing is learnt about sharing. The rows made of them always share, on two levels.
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
from trl_refplug.scoring.packed import PackedPass, why


TOKENS = 1024
"""Most tokens, with padding, of the rows that are scored both ways."""

FEWEST_TOKENS = 60
"""Of the smallest such rows."""

SHIFT = 512
"""By how many positions a row is moved, where the model has as many. Thousands would be a matter of rounding."""

MOVED = 10
"""Times the tolerance by which its log-probs may differ then: rotary embeddings are rounded anew."""

_ROWS = 10
_BRANCHES = 3


def verify(packed: PackedPass, rows: Sequence[Ints]) -> str | None:
    """
    Why packed answers are not to be trusted, as a phrase that completes "because of"; `None` if they agree.

    One exact and one packed forward pass over at most [`TOKENS`] tokens; over half of them where memory runs out. And
    one of a single row further from the first position, as padding on its left has it: `packed.absolute` is set where
    that changes its log-probs. As many passes on every rank, whatever its rows.

    Args:
        rows (`Sequence[np.ndarray]`): Token ids of real rows, to make those that are compared of.
    """
    tokens = max(FEWEST_TOKENS, min(TOKENS, packed.budget))
    while True:
        try:
            return _compare(packed, sharing_rows(rows, packed.config, tokens, packed.limit))
        except Exception as error:
            if not ran_out_of_memory(error):
                return why(error)
            if packed.lockstep or tokens == FEWEST_TOKENS:
                raise
            tokens = max(FEWEST_TOKENS, tokens // 2)


def _compare(packed: PackedPass, rows: list[Row]) -> str | None:
    padded = PaddedRows.flush_left(rows)
    with evaluation_mode(packed.model):
        exact = list(padded.values_by_row(exact_log_probs(packed.model, padded.to_batch(packed.device))))
    (pack,) = packed.plan(rows, None)
    scored = packed.score(pack)
    if not packed.absolute:
        # Only now: a model whose table of positions is as long as its input has been found out
        differences = (_moved(packed, padded.select([0])) - torch.from_numpy(exact[0])).abs()
        allowed = MOVED * tolerance_of(scored.dtype).largest
        packed.absolute = bool((differences > allowed).any())
    answers: Tensor = scored.log_probs.cpu()
    found = [answers[torch.from_numpy(answer)] for answer in pack.answers]
    expected = [torch.from_numpy(exact[index]) for index in pack.rows]
    return disagreement(torch.cat(found), torch.cat(expected), scored.dtype)


def _moved(packed: PackedPass, row: PaddedRows) -> Tensor:
    """The exact call's log-probs of a row some way behind the first position."""
    batch = row.to_batch(packed.device)
    positions = min(_positions(packed.config), batch_length_limit(causal_lm(packed.model)))
    start = int(max(0, min(SHIFT, positions - row.width)))
    position_ids = torch.arange(start, start + row.width, device=packed.device)[None]
    with evaluation_mode(packed.model):
        log_probs = exact_log_probs(packed.model, replace(batch, extras={"position_ids": position_ids}))
    return torch.from_numpy(*row.values_by_row(log_probs))


def _positions(config: Any) -> float:
    """How many the model has."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or float("inf")


def sharing_rows(rows: Sequence[Ints], config: Any, tokens: int, limit: float = float("inf")) -> list[Row]:
    """
    Ten rows of the tokens of real ones: nine with a prefix in common, three times three of them with a longer one.
    What is scored is short, because what goes wrong where rows part goes wrong soon after.

    Args:
        rows (`Sequence[np.ndarray]`): Token ids of real rows. None is longer than the longest of them, if that is 6.
        config (`PretrainedConfig`): Of the model.
        tokens (`int`): How many there are at most in all ten, padded to the longest; at least 60.
        limit (`float`): None is longer, if it is at least 6.
    """
    # A model that takes a token's place in the pack for its position is to be found out, not to run out of positions:
    # a GPU does not recover from that
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
