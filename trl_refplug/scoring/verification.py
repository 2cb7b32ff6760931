"""
Whether a model's packed answers can be trusted: both ways to score are compared on rows made for that.

The first rows that happen to be asked for would not do: where they have no prefix in common, a packed pass is the
exact one, and nothing is learnt about sharing. These always share, on two levels. And they are the same for all data:
whether a model is trusted does not depend on what comes first, and all ranks find out together, in two passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from trl_refplug.scoring.exact import exact_log_probs, pad_rows
from trl_refplug.scoring.execution import evaluation_mode
from trl_refplug.scoring.packed import PackedPass, why
from trl_refplug.scoring.precision import disagreement
from trl_refplug.scoring.rows import Ints, Row


TOKENS = 512
"""Most tokens, with padding, of the rows that are scored both ways."""

FEWEST_TOKENS = 60
"""Of the smallest such rows."""


def verify(packed: PackedPass) -> str | None:
    """
    Why packed answers are not to be trusted, as a phrase that completes "because of"; `None` if they agree.

    One exact and one packed forward pass over at most [`TOKENS`] tokens; over half of them where memory runs out.
    """
    tokens = max(FEWEST_TOKENS, min(TOKENS, packed.budget))
    while True:
        try:
            return _compare(packed, sharing_rows(packed.config, tokens, packed.limit))
        except Exception as error:
            if not should_reduce_batch_size(error):
                return why(error)
            if packed.lockstep or tokens == FEWEST_TOKENS:
                raise
            tokens = max(FEWEST_TOKENS, tokens // 2)


def _compare(packed: PackedPass, rows: list[Row]) -> str | None:
    with evaluation_mode(packed.model):
        exact = exact_log_probs(packed.model, pad_rows(rows, packed.device)).cpu()
    (pack,) = packed.plan(rows, None)
    scored = packed.score(pack)
    answers: Tensor = scored.log_probs.cpu()
    found = [answers[torch.from_numpy(answer)] for answer in pack.answers]
    expected = [exact[index, torch.from_numpy(rows[index].scored() - 1)] for index in pack.rows]
    return disagreement(torch.cat(found), torch.cat(expected), scored.dtype)


def sharing_rows(config: Any, tokens: int, limit: float = float("inf")) -> list[Row]:
    """
    Ten rows: nine with a prefix in common, three times three of them with a longer one. What is scored is short: where
    rows part, what goes wrong does so soon after.

    Args:
        config (`PretrainedConfig`): Of the model.
        tokens (`int`): How many there are at most in all rows, padded to the longest; at least 60.
        limit (`float`): No row is longer, if it is at least 6.
    """
    # A model that takes a token's place in the pack for its position is to be found out, not to run out of positions:
    # a GPU does not recover from that
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or float("inf")
    longest = int(min(tokens // 10, limit, positions // 3))
    end = max(2, longest // 10)
    start = max(2, longest - 2 * end)
    ids = _ordinary_tokens(config)
    draw = np.random.default_rng(0)
    trunk, other = draw.choice(ids, start), draw.choice(ids, start)
    branches = [draw.choice(ids, end) for _ in range(3)]
    lengths = (end, end, end - 1)
    rows = [Row.completion(trunk, [*branch, *draw.choice(ids, size)]) for branch in branches for size in lengths]
    return [*rows, Row.completion(other, draw.choice(ids, end))]


def _ordinary_tokens(config: Any) -> Ints:
    """Token ids without a meaning of their own: one that stands for an image is named, or was added at the end."""
    vocabulary = np.arange(config.get_text_config().vocab_size)
    return np.setdiff1d(vocabulary[: (len(vocabulary) + 1) // 2], list(_named_tokens(config.to_dict())))


def _named_tokens(value: Any, name: str = "") -> Iterator[int]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _named_tokens(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _named_tokens(inner, name)
    elif isinstance(value, int) and "token" in name:
        yield value
