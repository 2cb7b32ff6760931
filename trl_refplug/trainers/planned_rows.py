"""
The rows of a tokenized data set as the trainer will ask for them, without collating them.

Collating takes about 60 µs per row. For a data set of usual size that is several seconds, in every run. What TRL's
collators do to rows of text is simple enough to be done to whole columns at once. To be sure that the installed
release of TRL does just that, a few rows are collated as well, and compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from trl_refplug.rows.planned import PlannedRows
from trl_refplug.trainers.requested_batches import indexed_datasets, planned_batches
from trl_refplug.trainers.trl_patch import PatchPoint


_BLOCK_ROWS = 1024
_COMPARED_ROWS = 16
_COMPLETIONS = {
    "DataCollatorForPreference": ("chosen_ids", "rejected_ids"),
    "DataCollatorForUnpairedPreference": ("KL_completion_ids", "completion_ids"),
}

Ints = NDArray[np.int64]


class _Column(NamedTuple):
    """A column of lists: the items of all lists in one array, and for each list where it starts and how long it is."""

    items: Ints
    starts: Ints
    lengths: Ints


def planned_rows(trainer: Any, patch_point: PatchPoint, split: str) -> Iterator[PlannedRows] | None:
    """
    The same rows as [`~requested_batches.planned`], but without padding, in blocks, and in another order. `None` if
    the rows are not known beforehand, or if they are not collated by one of TRL's own collators for text.
    """
    datasets = indexed_datasets(trainer, patch_point, split)
    collator = trainer.data_collator
    if datasets is None or not all(_is_plain(dataset, collator) for dataset in datasets):
        return None
    if not all(_agrees(dataset, collator) for dataset in datasets):
        return None
    return chain.from_iterable(_rows(dataset, collator) for dataset in datasets)


def _is_plain(dataset: Any, collator: Any) -> bool:
    """Whether `collator` is one of TRL's that we know, and reads the columns of `dataset` as they are stored."""
    known = type(collator).__module__.startswith("trl.") and type(collator).__name__ in _COMPLETIONS
    return (
        known
        and isinstance(dataset, Dataset)
        and dataset.format["type"] is None
        and {"prompt_ids", _COMPLETIONS[type(collator).__name__][-1]} <= set(dataset.column_names)
        and collator.pad_to_multiple_of is None
        and (collator.max_length is None or collator.max_length > 0)
    )


def _agrees(dataset: Dataset, collator: Any) -> bool:
    """Whether the collator makes of some rows of `dataset` what this module makes of them."""
    if not len(dataset):
        return True
    some = dataset.select(np.unique(np.linspace(0, len(dataset) - 1, _COMPARED_ROWS).astype(int)))
    collated = sorted(
        (tuple(ids[mask == 1].tolist()), tuple((labels[mask == 1] != -100).tolist()[1:]))
        for batch in planned_batches(some, collator, torch.device("cpu"))
        if not batch.extras
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True)
    )
    read = sorted(
        (tuple(ids.tolist()), tuple((np.arange(1, len(ids)) >= first).tolist()))
        for rows in _rows(some, collator)
        for ids, first in zip(np.split(rows.token_ids, rows.offsets[1:-1]), rows.first_scored, strict=True)
    )
    return collated == read


def _rows(dataset: Dataset, collator: Any) -> Iterator[PlannedRows]:
    completions = [name for name in _COMPLETIONS[type(collator).__name__] if name in dataset.column_names]
    keep_end = getattr(collator, "truncation_mode", "keep_start") == "keep_end"
    tables = dataset.select_columns(["prompt_ids", *completions]).with_format("arrow")
    for start in range(0, len(dataset), _BLOCK_ROWS):
        table = tables[start : start + _BLOCK_ROWS]
        columns = [_column(table, name) for name in completions]
        yield _joined(_column(table, "prompt_ids"), columns, collator.max_length, keep_end)


def _column(table: Any, name: str) -> _Column:
    lists = table.column(name).combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    items = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return _Column(items, np.cumsum(lengths) - lengths, lengths)


def _joined(prompts: _Column, completions: list[_Column], max_length: int | None, keep_end: bool) -> PlannedRows:
    """
    Make the rows: each is a prompt followed by one of its completions, truncated. Rows with the same prompt come one
    after the other.
    """
    # A row has two pieces, the prompt and the completion. `starts` says where each begins among all items, `lengths`
    # how long it is. The shape of both is [rows of the data set, completions, 2].
    items = np.concatenate([prompts.items, *(column.items for column in completions)])
    begins = np.cumsum([len(prompts.items), *(len(column.items) for column in completions)])
    starts = np.stack(
        [
            np.stack([prompts.starts, begin + column.starts], axis=1)
            for begin, column in zip(begins.tolist(), completions, strict=False)
        ],
        axis=1,
    )
    lengths = np.stack([np.stack([prompts.lengths, column.lengths], axis=1) for column in completions], axis=1)
    if max_length is not None:
        excess = np.maximum(lengths.sum(-1) - max_length, 0)
        # Tokens are cut from the piece at the truncated end first, and then from the other one.
        near = np.minimum(excess, lengths[..., 0 if keep_end else 1])
        cut = np.stack([near, excess - near] if keep_end else [excess - near, near], axis=-1)
        lengths = lengths - cut
        starts = starts + cut if keep_end else starts
    row_lengths = lengths.sum(-1).ravel()
    flat_starts, flat_lengths = starts.ravel(), lengths.ravel()
    ends = np.cumsum(flat_lengths)
    source = np.repeat(flat_starts - (ends - flat_lengths), flat_lengths) + np.arange(ends[-1] if len(ends) else 0)
    return PlannedRows(
        token_ids=items[source],
        offsets=np.concatenate([[0], np.cumsum(row_lengths)]),
        first_scored=np.maximum(lengths[..., 0].ravel(), 1),
    )
