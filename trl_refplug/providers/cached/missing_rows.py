"""Finding the rows that training will ask for and that a store does not have."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from trl_refplug.errors import ConfigurationError
from trl_refplug.provider import ReferenceContext, ReferenceProvider
from trl_refplug.providers.cached.row_keys import BatchRows, RowKeys, TailScoredRows
from trl_refplug.rows import Row, Values
from trl_refplug.rows.planned import PlansRows
from trl_refplug.store import KEY_BYTES, LogProbStore


RowBlock = BatchRows | TailScoredRows
_SHARE = 128  # so many successive rows are scored by the same rank, because they often have the same prompt


@dataclass(frozen=True)
class _Descending:
    """
    A key that sorts in descending order. Of a heap's entries the smallest is the first, and we need the largest key.
    """

    key: bytes

    def __lt__(self, other: _Descending) -> bool:
        return self.key > other.key


@dataclass(frozen=True)
class MissingRow:
    """A row that the store does not have: its number among the planned rows, and its tokens."""

    number: int
    row: Row


@dataclass
class MissingRows:
    """
    Which of the planned rows a store has, and which it does not have.

    Args:
        rows (`int`): How many different rows are planned.
        missing (`set[bytes]`): The keys of those that the store does not have.
        mine (`set[bytes]`): The part of `missing` that this rank has to score.
        tokens (`int`): How many log-probs the rows in `mine` have.
        first (`MissingRow` or `None`): The first row that is missing.
        sample (`list[tuple[Row, Values]]`): A few rows that the store has, with its values, for verification.
    """

    rows: int = 0
    missing: set[bytes] = field(default_factory=set)
    mine: set[bytes] = field(default_factory=set)
    tokens: int = 0
    first: MissingRow | None = None
    sample: list[tuple[Row, Values]] = field(default_factory=list)


def check_known_ahead(context: ReferenceContext, source: ReferenceProvider) -> None:
    """
    Refuse fill='ahead' if the rows of the run are not known before training.

    Raises:
        ConfigurationError: The data set is a stream, or its completions are generated.
    """
    if context.planned("train") is None:
        raise ConfigurationError(
            "ref_provider='cached' (what `precompute_ref_log_probs=True` means): fill='ahead' is not supported "
            "with IterableDataset, or with a trainer that generates its completions: it scores rows before "
            "training, and here they are not known beforehand. Use fill='lazy'."
        )
    if context.planned("eval") is None and source.capabilities.before_training_only:
        raise ConfigurationError(
            "ref_provider='cached' (what `precompute_ref_log_probs=True` means) is not supported with "
            "IterableDataset for evaluation in full fine-tuning: its rows are first seen when the policy, which "
            'scores them, has moved. Evaluate on a Dataset, or name a source, such as {"source": "frozen"}.'
        )


def planned_blocks(context: ReferenceContext, keys: RowKeys) -> Iterator[RowBlock]:
    """All rows that training and evaluation will ask for, in blocks."""
    for split in ("train", "eval"):
        plain = context.planned_rows(split) if isinstance(context, PlansRows) else None
        if plain is not None:
            yield from map(keys.rows_of_plan, plain)
        else:
            yield from map(keys.rows_of_batch, context.planned(split) or ())


def find_missing(
    store: LogProbStore,
    blocks: Iterable[RowBlock],
    keys: RowKeys,
    *,
    verify: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> MissingRows:
    """
    Look up every planned row.

    Args:
        blocks (`Iterable[BatchRows | TailScoredRows]`): The planned rows: the same on every rank, in the same order.
        verify (`int`): How many of the stored rows are returned as a sample.
        rank (`int`), ranks (`int`): This rank, and how many there are: the missing rows are divided between them.
    """
    report = MissingRows()
    every: list[bytes] = []
    # The sample are the rows with the smallest keys: keys are hashes, so that is as good as a random choice. It is a
    # heap whose first entry has the largest key.
    sample: list[tuple[_Descending, Row, Values]] = []
    number = 0
    for rows in blocks:
        packed = rows.keys(keys.packed)
        counts = rows.scored_counts()
        there = store.contains(packed) | (counts == 0)  # a row without scored tokens needs no values
        missed = np.flatnonzero(~there)
        if len(missed):
            there[missed] = store.contains(rows.keys(keys.exact, missed.tolist()))
        for index in np.flatnonzero(~there).tolist():
            if packed[index] not in report.missing:
                report.missing.add(packed[index])
                report.first = report.first or MissingRow(number + index, rows.row(index))
                if (number + index) // _SHARE % ranks == rank:
                    report.mine.add(packed[index])
                    report.tokens += int(counts[index])
        if verify:
            for index in np.flatnonzero(there & (counts > 0)).tolist():
                key = packed[index]
                if (len(sample) < verify or key < sample[0][0].key) and all(key != kept.key for kept, *_ in sample):
                    entry = (_Descending(key), rows.row(index), _stored(store, keys, rows, index))
                    (heapq.heappush if len(sample) < verify else heapq.heappushpop)(sample, entry)
        every.append(b"".join(packed))
        number += len(rows)
    report.rows = len(np.unique(np.frombuffer(b"".join(every), f"V{KEY_BYTES}")))
    report.sample = [(row, values) for _, row, values in sample]
    return report


def _stored(store: LogProbStore, keys: RowKeys, rows: RowBlock, index: int) -> Values:
    answer = store.lookup([*rows.keys(keys.packed, [index]), *rows.keys(keys.exact, [index])])
    values = answer[1] if answer[0] is None else answer[0]
    assert values is not None
    return values
