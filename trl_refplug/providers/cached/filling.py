"""Scoring what a store misses: all that training will ask for before it begins, or a batch's rows as it asks."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from trl_refplug.errors import (
    ConfigurationError,
    MissingRowError,
    ReferenceMismatchError,
    StoreError,
    UnsupportedInputError,
)
from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.probe import Probe, probe_batch
from trl_refplug.models.tolerances import Tolerance
from trl_refplug.models.weights import WeightMark, changed_weights, mark_weights
from trl_refplug.provider import (
    BulkScorer,
    ReferenceBatch,
    ReferenceContext,
    ReferenceProvider,
    SampleCheck,
    ScoresInBulk,
)
from trl_refplug.providers.cached.batch_scorer import BatchScorer
from trl_refplug.providers.cached.missing_rows import MissingRows, RowBlock, find_missing, planned_blocks
from trl_refplug.providers.cached.row_keys import BatchRows, RowKeys, select
from trl_refplug.providers.cached.sharing import SharedWork
from trl_refplug.providers.cached.verifying import check_sample
from trl_refplug.providers.scorers import trainer_precision
from trl_refplug.rows import Row, Values
from trl_refplug.runtime.ranks import any_rank, min_over_ranks
from trl_refplug.store import LogProbStore


logger = logging.getLogger("trl_refplug")

_TOKENS_SHOWN = 12
_VERIFIED_ROWS = 4
_UNTIL_PUBLISHED = 30.0  # seconds: what is put is published within ten
_WINDOWS = 64  # into which the rows of a run are divided, so that several processes can share them; a window has ...
_FEWEST_ROWS, _MOST_ROWS = 8, 1024  # ... no fewer and no more rows than these


class Filler:
    """
    Has the rows scored that a store misses.

    Args:
        context ([`ReferenceContext`]): Of the run, once its trainer is built.
        source ([`ReferenceProvider`]): Scores.
        keys ([`RowKeys`]): Of its rows.
        tolerance ([`Tolerance`]): Between a stored row and the same row scored again.
        fill, verify: What the options of `cached` say.

    Attributes:
        waits_for_training (`bool`): Whether `prepare` belongs in `on_train_begin` and not in `setup`: FSDP and
            DeepSpeed shard a policy, and cast it, only then.
    """

    def __init__(
        self,
        context: ReferenceContext,
        source: ReferenceProvider,
        keys: RowKeys,
        tolerance: Tolerance,
        *,
        fill: Literal["ahead", "lazy", "never"],
        verify: int | None,
    ) -> None:
        self._context = context
        self._source = source
        self._keys = keys
        self._tolerance = tolerance
        self._fill = fill
        self._verify = verify
        self._dtype = _dtype_of(context.policy)
        self._said: Probe | None = None  # what the source says about the probe
        self._marks: dict[str, WeightMark] = {}  # of the weights it scores with
        local = source.capabilities.local_model
        # A model over which all ranks have a part is run by all of them at once, or not at all.
        self._in_step = local and _shards_parameters(context.accelerator)
        kind = context.accelerator.distributed_type
        self.waits_for_training = local and fill == "ahead" and kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM")

    def compare_probe(self, store: LogProbStore, *, scoring: bool = False) -> None:
        """
        Ask the source about the probe, and compare what it says with what the reference of the stored rows said.

        Args:
            scoring (`bool`): Whether rows are about to be scored. If not, a source that is not at hand is left alone.

        Raises:
            ReferenceMismatchError: The store has rows of another reference that goes by the same identity.
        """
        rows = self._context.probe_rows
        if self._said is not None or rows is None:
            return
        batch = probe_batch(rows, self._context.accelerator.device)
        with torch.no_grad(), trainer_precision(self._context.accelerator):
            found = self._source.log_probs(batch) if scoring else self._source.probe(batch)
        if found is None:
            return
        self._said = probe = Probe(rows, found.float().cpu(), "the source")
        self._marks = mark_weights(self._source.weights())
        digest = self._source.identity().digest
        for said in store.provenances:
            if "probe" in said and said.get("reference", {}).get("digest") == digest:
                largest, mean = probe.difference_where_asked(Probe.from_dict(said["probe"]))
                if not self._tolerance.allows(largest, mean):
                    raise ReferenceMismatchError(
                        f"The store {store.location!r} has log-probs of a reference that goes by the same identity, "
                        f"{self._source.identity()}, and is another: about the same rows of text the two differ by up "
                        f"to {largest:.3g} nats per token (tolerance {self._tolerance.largest:g}), {mean:.3g} on "
                        f"average (tolerance {self._tolerance.mean:g}). Use another `path`, or ask the reference of "
                        "before."
                    )
        if store.mode == "a":
            store.add_provenance(probe=probe.to_dict())

    def prepare(self, store: LogProbStore) -> SampleCheck | None:
        """
        Look up all that training will ask for, score some of it again, and score what is missing.

        Returns:
            `SampleCheck` or `None`: How far what was scored again is from what the store has, if anything was.

        Raises:
            ConfigurationError: `verify` was given, and nothing can be scored again.
            MissingRowError: With fill='never', a row is missing.
            ReferenceMismatchError: The store has other values than the source.
        """
        if self._verify and (obstacle := self._obstacle()):
            raise ConfigurationError(
                f"ref_provider='cached': verify={self._verify} has stored rows scored again at the start, and "
                f"{obstacle}. Remove the option, or set it to 0."
            )
        if self._context.planned("train") is None:
            return None  # fill='never': each batch is looked up as it comes
        accelerator = self._context.accelerator
        self.compare_probe(store)
        found = find_missing(
            store,
            self._planned(),
            self._keys,
            verify=_VERIFIED_ROWS if self._verify is None else self._verify,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
        )
        missing = bool(found.missing)
        if self._in_step and self.waits_for_training:
            # One rank may see more of the store than others, and all do the same.
            missing = any_rank(missing)
            found.sample = found.sample[: min_over_ranks(len(found.sample))]
        check = None
        source_needed = (missing and self._fill != "never") or bool(self._verify)
        if (source_needed or self._source.at_hand) and not self._obstacle():
            with trainer_precision(accelerator):
                check = check_sample(found, self._source, accelerator.device, self._tolerance)
        if missing and self._fill == "never":
            assert found.first is not None
            raise MissingRowError(
                f"{len(found.missing):,} of the {found.rows:,} rows that training will ask for are not in the store "
                f"{store.location!r}; the first is planned row {found.first.number}, "
                f"{self._shown(found.first.row)}. {self._why_not_scored()}"
            )
        if missing and (found.mine or self._in_step):
            self.compare_probe(store, scoring=True)
            with trainer_precision(accelerator):
                fill(
                    store,
                    self._planned,
                    self._keys,
                    found,
                    self._source,
                    accelerator.device,
                    progress=accelerator.is_main_process and not self._context.args.disable_tqdm,
                    any_rank=any_rank if self._in_step else None,
                )
        return check

    def check_complete(self, store: LogProbStore) -> None:
        """
        After `prepare` on all ranks, with the store opened anew.

        Raises:
            StoreError: Rows that other ranks have scored are not seen from here.
        """
        left = find_missing(store, self._planned(), self._keys)
        until = time.monotonic() + _UNTIL_PUBLISHED
        while left.missing and time.monotonic() < until:  # what another run on another rank's machine has put
            time.sleep(2)
            store.refresh()
            left = find_missing(store, self._planned(), self._keys)
        if left.missing:
            raise StoreError(
                f"{len(left.missing):,} rows that other ranks have scored are not in {store.location!r} as rank "
                f"{self._context.accelerator.process_index} sees it. Use a `path` that all nodes share."
            )

    def score(self, store: LogProbStore, batch: ReferenceBatch, rows: BatchRows, missing: list[int]) -> list[Values]:
        """
        Score the rows of `batch` that `store` misses: the values of each.

        Raises:
            MissingRowError: Nothing may score them now.
        """
        which = self._shown(rows.row(missing[0]))
        what = f"Row {missing[0]} of the batch, {which}, is not in the store {store.location!r}"
        if self._fill == "never" or self._in_step:
            raise MissingRowError(f"{what}. {self._why_not_scored()}")
        self._refuse_cast_policy()
        self.compare_probe(store, scoring=True)
        try:
            with trainer_precision(self._context.accelerator):
                log_probs = self._source.log_probs(select(batch, missing))
        except MissingRowError as error:
            raise MissingRowError(f"{what}, and {error}") from None
        self._refuse_moved_source(store)
        return list(rows.padded.select(missing).values_by_row(log_probs))

    def _refuse_moved_source(self, store: LogProbStore) -> None:
        """What a source scores while training goes on is stored for later runs, so it must be what it was."""
        if self._said is None:
            return
        with torch.no_grad(), trainer_precision(self._context.accelerator):
            found = self._source.probe(probe_batch(self._said.rows, self._context.accelerator.device))
        changed, rounded = changed_weights(self._marks, self._source.weights())
        moved = found is not None and not self._tolerance.allows(*self._said.difference(found))
        if moved or (changed and not rounded):
            shown = f" ({len(changed)} weights were changed: {changed[0]}, ...)" if changed else ""
            raise ReferenceMismatchError(
                f"The reference {self._source.identity()}, which scores rows that {store.location!r} misses while "
                f"training goes on, is not what it was when training began{shown}. Nothing of this batch was stored. "
                "A callback, or the code around the trainer, changed it: remove what does, or use a source that "
                'shares nothing with the policy: {"source": "frozen"}.'
            )

    def _refuse_cast_policy(self) -> None:
        """transformers casts a policy in place for an evaluation outside of training."""
        args = self._context.args
        if not self._source.capabilities.scores_policy or args.deepspeed_plugin is not None:
            return  # another model scores, or DeepSpeed has cast the policy already
        flag = next((name for name in ("bf16_full_eval", "fp16_full_eval") if getattr(args, name, False)), None)
        if flag and _dtype_of(self._context.policy) != self._dtype:
            raise MissingRowError(
                f"`{flag}=True` has cast the policy, with which rows are scored, to "
                f"{str(_dtype_of(self._context.policy)).removeprefix('torch.')}: their log-probs would not be the "
                "reference's. Use `bf16=True` or `fp16=True` instead, or evaluate on rows that are in the store."
            )

    def _planned(self) -> Iterator[RowBlock]:
        return planned_blocks(self._context, self._keys)

    def _obstacle(self) -> str:
        """Why no stored row can be scored again now; an empty string if one can."""
        if self._context.planned("train") is None:
            return "the rows of this run are not known at the start"
        if self._source.unavailable:  # as training begins it may be resumed
            return self._source.unavailable
        if self._in_step and not self.waits_for_training:
            return "a model that is sharded over ranks is scored only with fill='ahead'"
        return ""

    def _why_not_scored(self) -> str:
        if self._fill == "never":
            return "fill='never' scores nothing: use fill='ahead' or 'lazy', or another path."
        if self.waits_for_training:
            return (
                "The rows of a run are scored as its training begins, which shards the policy: evaluate after that, "
                "on the run's own evaluation set."
            )
        return (
            "A model that is sharded over ranks (FSDP, DeepSpeed ZeRO-3) cannot score rows one rank at a time. Use "
            "fill='ahead', which scores all rows of the run as training begins, or a source that is not in this "
            'process: {"source": "remote", "source_kwargs": {"url": ...}}.'
        )

    def _shown(self, row: Row) -> str:
        decode = getattr(self._context.processing_class, "decode", None)
        start = row.input_ids[:_TOKENS_SHOWN].tolist()
        return f"which begins {decode(start) if decode else start!r}"


def _dtype_of(policy: torch.nn.Module) -> torch.dtype:
    dtype: torch.dtype = causal_lm(policy).dtype
    return dtype


def _shards_parameters(accelerator: Any) -> bool:
    """Whether each rank holds a part of the policy only. ZeRO-1 and ZeRO-2 leave its parameters whole."""
    if accelerator.distributed_type == "DEEPSPEED":
        return bool(accelerator.state.deepspeed_plugin.zero_stage == 3)
    return accelerator.distributed_type in ("FSDP", "MEGATRON_LM")


def fill(
    store: LogProbStore,
    planned: Callable[[], Iterable[RowBlock]],
    keys: RowKeys,
    found: MissingRows,
    source: ReferenceProvider,
    device: torch.device,
    *,
    progress: bool,
    any_rank: Callable[[bool], bool] | None = None,
) -> None:
    """
    Score this rank's part of what is missing, and store it as it is scored.

    Args:
        planned (`Callable`): Gives all rows of the run, in blocks, as often as it is called.
        device (`torch.device`): The trainer's.
        any_rank (`Callable[[bool], bool]`, *optional*): Whether something holds on any rank. Given where the source is
            sharded: then every rank makes as many forward passes as the others, on padded batches.

    Raises:
        StoreWriteError: Rows could not be published; what was published before is kept.
    """
    store.ensure_room(found.tokens)
    bar = tqdm(total=len(found.mine), desc="Reference log-probs", unit="row", disable=not progress)
    filling = _Filling(store, keys, found, bar)
    started = time.perf_counter()
    with bar:
        if any_rank is not None:
            filling.score(filling.all_rows(planned()), BatchScorer(source, device, any_rank), bulk=False)
        elif isinstance(source, ScoresInBulk):
            with source.bulk_scorer() as scorer:
                filling.score_windows(planned, scorer, bulk=True)
        else:
            filling.score_windows(planned, BatchScorer(source, device), bulk=False)
    store.flush()
    seconds = time.perf_counter() - started
    line = (
        f"Scored {filling.rows:,} rows ({filling.tokens:,} log-probs) into {store.location} in {seconds:,.1f} s, "
        f"{filling.rows / seconds:,.0f} rows/s; {found.rows - len(found.missing):,} of {found.rows:,} were there"
    )
    if others := len(found.mine) - filling.rows:
        line += f", {others:,} were scored by other processes meanwhile"
    logger.info("%s.", line)
    if progress:
        tqdm.write(f"{line}.", file=sys.stderr)


class _Filling:
    """
    The rows that are still to be scored.

    Attributes:
        rows (`int`), tokens (`int`): How many rows, and log-probs in them, were scored so far.
    """

    def __init__(self, store: LogProbStore, keys: RowKeys, found: MissingRows, bar: Any) -> None:
        self.rows = self.tokens = 0
        self._store = store
        self._keys = keys
        self._pending = set(found.mine)
        self._window = min(max(found.rows // _WINDOWS, _FEWEST_ROWS), _MOST_ROWS)
        self._bar = bar

    def score_windows(self, planned: Callable[[], Iterable[RowBlock]], scorer: BulkScorer, *, bulk: bool) -> None:
        """Score window by window, and look before each of them at what other processes have put."""
        work = SharedWork(self._store)
        turn = 0
        while self._pending:
            for block in planned():
                keys = block.keys(self._keys.packed)
                for start in range(0, len(keys), self._window):
                    indices = [
                        i for i in range(start, min(start + self._window, len(keys))) if keys[i] in self._pending
                    ]
                    if indices and work.turn(keys[start]) <= turn:
                        work.look()
                        self.score(self._rows(block, keys, indices), scorer, bulk=bulk)
            turn += 1

    def all_rows(self, blocks: Iterable[RowBlock]) -> Iterator[tuple[RowBlock, int, bytes]]:
        """Every row that is pending, with its block, its index in it and its key."""
        for block in blocks:
            keys = block.keys(self._keys.packed)
            yield from self._rows(block, keys, range(len(keys)))

    def _rows(
        self, block: RowBlock, keys: Sequence[bytes], indices: Iterable[int]
    ) -> Iterator[tuple[RowBlock, int, bytes]]:
        there = self._store.contains(keys)  # by now: others fill it, too
        for index in indices:
            if keys[index] not in self._pending:
                continue
            self._pending.discard(keys[index])
            if there[index]:
                self._bar.update()
                continue
            if block.padding_offset(index):
                raise UnsupportedInputError(
                    "fill='ahead' cannot score rows that are padded on the left for a model with absolute positions: "
                    "their log-probs depend on the padding. Pad on the right, or use fill='lazy'."
                )
            yield block, index, keys[index]

    def score(self, rows: Iterator[tuple[RowBlock, int, bytes]], scorer: BulkScorer, *, bulk: bool) -> None:
        """Score rows, and put each pass into the store as soon as it is done."""
        sent: dict[int, bytes] = {}

        def unpadded() -> Iterator[Row]:
            for number, (block, index, key) in enumerate(rows):
                sent[number] = key if bulk else block.keys(self._keys.exact, [index])[0]
                yield block.row(index)

        for answers in scorer.score_passes(unpadded()):
            # Pass by pass, so that a killed process loses no more than the one it is in.
            self._store.put([sent.pop(number) for number, _ in answers], [values.numpy() for _, values in answers])
            self.rows += len(answers)
            self.tokens += sum(len(values) for _, values in answers)
            self._bar.update(len(answers))
