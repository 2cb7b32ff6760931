"""Filling a store before training: what is missing of the batches planned, scored in bulk."""

from __future__ import annotations

import heapq
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from trl_refplug.errors import ConfigurationError, ReferenceMismatchError, UnsupportedInputError
from trl_refplug.provider import ReferenceContext, ReferenceProvider
from trl_refplug.providers.caching.batch_scorer import BatchScorer
from trl_refplug.providers.caching.borrowed import BorrowedPolicy
from trl_refplug.providers.caching.row_keys import BatchRows, RowKeys, TailScoredRows, Values
from trl_refplug.providers.caching.sharing import SharedWork
from trl_refplug.scoring import Row
from trl_refplug.scoring.exact import pad_rows
from trl_refplug.store import KEY_BYTES, LogProbStore
from trl_refplug.tolerances import Tolerance


logger = logging.getLogger("trl_refplug")

RowBlock = BatchRows | TailScoredRows
_SHARE = 128  # rows in a row that one rank scores: neighbours have prompts in common
_VERIFIED_AT_ONCE = 4  # rows of a sample


@dataclass(frozen=True)
class _Descending:
    """A key that is smaller the larger it is: heaps keep the smallest."""

    key: bytes

    def __lt__(self, other: _Descending) -> bool:
        return self.key > other.key


@dataclass(frozen=True)
class MissingRow:
    """A row the store does not have: its number among the planned ones, and its tokens."""

    number: int
    row: Row


@dataclass
class Survey:
    """
    What a store has of the rows planned.

    Args:
        rows (`int`): Different rows planned.
        missing (`set[bytes]`): Keys of those the store misses.
        mine (`set[bytes]`): The part of `missing` that is this rank's to score.
        tokens (`int`): Log-probs in `mine`.
        first (`MissingRow` or `None`): The first that is missing.
        sample (`list[tuple[Row, Values]]`): Some rows the store has, chosen by their keys, for verification.
    """

    rows: int = 0
    missing: set[bytes] = field(default_factory=set)
    mine: set[bytes] = field(default_factory=set)
    tokens: int = 0
    first: MissingRow | None = None
    sample: list[tuple[Row, Values]] = field(default_factory=list)


def check_known_ahead(context: ReferenceContext, source: ReferenceProvider) -> None:
    """
    Refuse to fill ahead what is not known ahead.

    Raises:
        ConfigurationError: The data set is a stream, or its completions are generated.
    """
    if context.planned("train") is None:
        raise ConfigurationError(
            "ref_provider='cached' (what `precompute_ref_log_probs=True` means): fill='ahead' is not supported "
            "with IterableDataset, or with a trainer that generates its completions: it scores rows before "
            "training, and here they are not known beforehand. Use fill='lazy'."
        )
    if context.planned("eval") is None and isinstance(source, BorrowedPolicy):
        raise ConfigurationError(
            "ref_provider='cached' (what `precompute_ref_log_probs=True` means) is not supported with "
            "IterableDataset for evaluation in full fine-tuning: its rows are first seen when the policy, which "
            'scores them, has moved. Evaluate on a Dataset, or name a source, such as {"source": "frozen"}.'
        )


def planned_blocks(context: ReferenceContext, keys: RowKeys) -> Iterator[RowBlock]:
    """All rows that training and evaluation are going to ask for."""
    for split in ("train", "eval"):
        plain = context.planned_rows(split)
        if plain is not None:
            yield from map(keys.of_planned, plain)
        else:
            yield from map(keys.of, context.planned(split) or ())


def survey(
    store: LogProbStore,
    blocks: Iterable[RowBlock],
    keys: RowKeys,
    *,
    verify: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Survey:
    """
    Look up every row planned.

    Args:
        blocks (`Iterable[BatchRows | TailScoredRows]`): The same on every rank, in the same order.
        verify (`int`): How many of the rows found are kept as a sample.
    """
    report = Survey()
    every: list[bytes] = []
    # The largest of the keys kept comes first: keys are hashes, so those with the smallest ones are a random sample.
    sample: list[tuple[_Descending, Row, Values]] = []
    number = 0
    for rows in blocks:
        packed = rows.keys(keys.packed)
        counts = rows.scored_counts()
        there = store.contains(packed) | (counts == 0)  # what has no scored token has nothing to be stored
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


def fill(
    store: LogProbStore,
    blocks: Iterable[RowBlock],
    keys: RowKeys,
    found: Survey,
    source: Any,
    device: torch.device,
    *,
    progress: bool,
    any_rank: Callable[[bool], bool] | None = None,
) -> None:
    """
    Score this rank's part of what is missing, and store it as it is scored.

    Args:
        device (`torch.device`): The trainer's.
        any_rank (`Callable[[bool], bool]`, *optional*): Whether something holds on any rank. Given where the source is
            sharded: then every rank makes as many forward passes as the others, on padded batches.

    Raises:
        StoreWriteError: Rows could not be published; what was published before is kept.
    """
    store.ensure_room(found.tokens)
    pending = set(found.mine)
    sent: dict[int, tuple[bytes, Any]] = {}
    numbers = count()

    def missing_rows() -> Iterator[Row]:
        for rows in blocks:
            if not pending:
                return
            keys_here = rows.keys(keys.packed)
            there = store.contains(keys_here)  # by now: others fill it, too
            for index, key in enumerate(keys_here):
                if key not in pending:
                    continue
                pending.discard(key)
                if there[index]:
                    bar.update()
                    continue
                if rows.padding_offset(index):
                    raise UnsupportedInputError(
                        "fill='ahead' cannot score rows that are padded on the left for a model with absolute "
                        "positions: their log-probs depend on the padding. Pad on the right, or use fill='lazy'."
                    )
                sent[next(numbers)] = (
                    key if bulk else rows.keys(keys.exact, [index])[0],
                    rows.scored_positions(index),
                )
                yield rows.row(index)

    def leave_out(number: int) -> None:
        del sent[number]
        bar.update()

    bulk = any_rank is None and hasattr(source, "bulk_scorer")
    batches = BatchScorer(source, device, any_rank)
    shared = SharedWork(store, lambda number: sent[number][0], leave_out)
    started = time.perf_counter()
    scored_rows = scored_tokens = 0
    scorer: Any
    bar = tqdm(total=len(found.mine), desc="Reference log-probs", unit="row", disable=not progress)
    with bar, source.bulk_scorer() if bulk else nullcontext(batches) as scorer:
        for answers in scorer.score_passes(missing_rows(), shared.choose):
            done = [sent.pop(number) for number, _ in answers]
            # Pass by pass, so that a killed process loses no more than the one it is in.
            store.put(
                [key for key, _ in done],
                [values.numpy()[scored - 1] for (_, scored), (_, values) in zip(done, answers, strict=True)],
            )
            scored_rows += len(done)
            scored_tokens += sum(len(scored) for _, scored in done)
            bar.update(len(done))
    store.flush()
    seconds = time.perf_counter() - started
    line = (
        f"Scored {scored_rows:,} rows ({scored_tokens:,} log-probs) into {store.location} in {seconds:,.1f} s, "
        f"{scored_rows / seconds:,.0f} rows/s; {found.rows - len(found.missing):,} of {found.rows:,} were there"
    )
    if others := len(found.mine) - scored_rows:
        line += f", {others:,} were scored by other processes meanwhile"
    logger.info("%s.", line)
    if progress:
        tqdm.write(f"{line}.", file=sys.stderr)


@dataclass(frozen=True)
class SampleCheck:
    """How far stored rows are from the same rows scored again: nats per token, at most and on average."""

    rows: int
    largest: float
    mean: float


def check_sample(
    found: Survey, source: ReferenceProvider, device: torch.device, tolerance: Tolerance
) -> SampleCheck | None:
    """
    Score some stored rows again. `None` if there are none.

    Raises:
        ReferenceMismatchError: They differ by more than rounding.
    """
    if not found.sample:
        return None
    sample = sorted(found.sample, key=lambda entry: len(entry[0]))
    differences = []
    for start in range(0, len(sample), _VERIFIED_AT_ONCE):
        some = sample[start : start + _VERIFIED_AT_ONCE]
        again = source.log_probs(pad_rows([row for row, _ in some], device)).float().cpu().numpy()
        differences += [
            np.abs(line[row.scored() - 1].astype(np.float64) - stored)
            for line, (row, stored) in zip(again, some, strict=True)
        ]
    every = np.concatenate(differences)
    check = SampleCheck(len(sample), float(every.max()), float(every.mean()))
    if not (check.largest <= tolerance.largest and check.mean <= tolerance.mean):  # so that NaN is refused
        raise ReferenceMismatchError(
            f"{check.rows} rows of the store were scored again, and differ from what it has by up to "
            f"{check.largest:.3g} nats per token (tolerance {tolerance.largest:g}), {check.mean:.3g} on average "
            f"(tolerance {tolerance.mean:g}). The store holds wrong values for this reference, or this machine "
            "computes differently. Use another `path`; `trl-refplug store verify` checks the files."
        )
    return check
