"""Rows to time scoring with. They are made from a preference data set, or from random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_refplug.errors import ConfigurationError, did_you_mean
from trl_refplug.rows import Ints, Row


TRL_BATCH = 8
"""Pairs in a batch of TRL's precompute by default. Shapes that have no pairs take this number of rows."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Token ids of a prompt and of its two completions, each a one-dimensional int64 array."""

    prompt: Ints
    chosen: Ints
    rejected: Ints


@dataclass(frozen=True, eq=False)
class Workload:
    """
    The rows of one shape.

    Args:
        shape (`str`): One of [`SHAPES`].
        rows (`list[Row]`): The rows, in the order of the data set.
        batches (`list[list[int]]`): For each of TRL's batches, the indices of its rows.
    """

    shape: str
    rows: list[Row]
    batches: list[list[int]]


def workload(shape: str, pairs: Sequence[Pair], max_length: int) -> Workload:
    """
    Make the rows of a shape from pairs.

    Args:
        shape (`str`): One of [`SHAPES`].
        pairs (`Sequence[Pair]`): The pairs to take tokens from.
        max_length (`int`): Rows are cut to this many tokens.

    Raises:
        ConfigurationError: There is no such shape, or nothing to score is left of the rows.
    """
    if shape not in SHAPES:
        raise ConfigurationError(
            f"Found shape {shape!r}, expected one of {', '.join(SHAPES)}.{did_you_mean(shape, SHAPES)}"
        )
    rows, batches = SHAPES[shape](pairs)
    rows = [Row(row.input_ids[:max_length], row.labels[:max_length]) for row in rows]
    if not any(len(row.scored) for row in rows):
        raise ConfigurationError(
            f"Found nothing to score in the rows of shape {shape!r} once cut to {max_length} tokens, expected "
            "completions to begin before that; raise --max-length."
        )
    return Workload(shape, rows, batches)


RowsAndBatches = tuple[list[Row], list[list[int]]]


def _pairs(pairs: Sequence[Pair]) -> RowsAndBatches:
    """The pairs as they are. As in TRL, the chosen rows of a batch come before its rejected rows."""
    rows: list[Row] = []
    batches: list[list[int]] = []
    for start in range(0, len(pairs), TRL_BATCH):
        batch = pairs[start : start + TRL_BATCH]
        batches.append(list(range(len(rows), len(rows) + 2 * len(batch))))
        rows += [Row.completion(pair.prompt, pair.chosen) for pair in batch]
        rows += [Row.completion(pair.prompt, pair.rejected) for pair in batch]
    return rows, batches


def _long_prompt(pairs: Sequence[Pair]) -> RowsAndBatches:
    """The pairs with prompts cut to a third of their length, and completions to a third of the prompt's new length."""

    def cut(pair: Pair) -> Pair:
        prompt = pair.prompt[: max(1, len(pair.prompt) // 3)]
        length = max(1, len(prompt) // 3)
        return Pair(prompt, pair.chosen[:length], pair.rejected[:length])

    return _pairs([cut(pair) for pair in pairs])


def _grpo(pairs: Sequence[Pair]) -> RowsAndBatches:
    """Prompts of 512 tokens with 8 completions of 64 tokens each. There are as many rows as the pairs have."""
    tokens = _text(pairs)
    rows = []
    for _ in range(max(1, len(pairs) // 4)):
        prompt = _next_tokens(tokens, 512)
        rows += [Row.completion(prompt, _next_tokens(tokens, 64)) for _ in range(8)]
    return rows, _in_order(len(rows))


def _unshared(pairs: Sequence[Pair]) -> RowsAndBatches:
    """Rows of 256 tokens without a common prefix. All tokens are scored."""
    tokens = _text(pairs)
    rows = [Row(ids, ids) for ids in (_next_tokens(tokens, 256) for _ in range(2 * len(pairs)))]
    return rows, _in_order(len(rows))


def _long(pairs: Sequence[Pair]) -> RowsAndBatches:
    """For every 16 pairs, one pair with rows of 4,096 tokens, half of which are the prompt."""
    tokens = _text(pairs)
    long = [
        Pair(_next_tokens(tokens, 2048), _next_tokens(tokens, 2048), _next_tokens(tokens, 2048))
        for _ in range(0, len(pairs), 16)
    ]
    rows = [Row.completion(pair.prompt, answer) for pair in long for answer in (pair.chosen, pair.rejected)]
    return rows, [[index, index + 1] for index in range(0, len(rows), 2)]


SHAPES: dict[str, Callable[[Sequence[Pair]], RowsAndBatches]] = {
    "pairs": _pairs,
    "long-prompt": _long_prompt,
    "grpo": _grpo,
    "unshared": _unshared,
    "long": _long,
}


def _in_order(rows: int) -> list[list[int]]:
    return [list(range(start, min(start + TRL_BATCH, rows))) for start in range(0, rows, TRL_BATCH)]


def _text(pairs: Sequence[Pair]) -> Iterator[int]:
    """
    Yield all tokens of the pairs one after the other, without end.

    After each round the tokens are shuffled, so that no text repeats.
    """
    tokens = np.concatenate([part for pair in pairs for part in (pair.prompt, pair.chosen, pair.rejected)])
    rng = np.random.default_rng(0)
    while True:
        yield from tokens.tolist()
        tokens = rng.permutation(tokens)


def _next_tokens(tokens: Iterator[int], count: int) -> Ints:
    return np.fromiter((next(tokens) for _ in range(count)), np.int64, count)


def synthetic_pairs(count: int, vocabulary: int) -> list[Pair]:
    """Pairs of random tokens. Their lengths are distributed as in real preference data, where prompts vary most."""
    rng = np.random.default_rng(0)

    def tokens(median: float, spread: float) -> Ints:
        return rng.integers(0, vocabulary, int(np.clip(rng.lognormal(np.log(median), spread), 8, 2048)))

    return [Pair(tokens(190, 1.1), tokens(250, 0.8), tokens(250, 0.8)) for _ in range(count)]


def tokenize_pairs(pairs: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[Pair]:
    """Tokenize pairs in TRL's preference format as TRL does. They may be texts or messages."""
    tokenized = []
    for pair in pairs:
        prompt = _tokenize(tokenizer, pair["prompt"], "")
        whole = [_tokenize(tokenizer, pair["prompt"], pair[name]) for name in ("chosen", "rejected")]
        tokenized.append(Pair(prompt, *(ids[len(prompt) :] for ids in whole)))
    return tokenized


def _tokenize(tokenizer: Any, prompt: Any, completion: Any) -> Ints:
    if isinstance(prompt, str):
        text = prompt + completion + (tokenizer.eos_token or "" if completion else "")
        ids = tokenizer(text)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(
            prompt + (completion or []), add_generation_prompt=not completion, tokenize=True, return_dict=False
        )
    return np.asarray(ids, np.int64)
