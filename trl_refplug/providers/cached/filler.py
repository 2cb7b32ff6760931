"""Scoring the rows that a store does not have: before training, or when training asks for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch

from trl_refplug.errors import (
    ConfigurationError,
    MissingRowError,
    StoreError,
)
from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.tolerances import Tolerance
from trl_refplug.provider import (
    ReferenceBatch,
    ReferenceContext,
    ReferenceProvider,
    SampleCheck,
)
from trl_refplug.providers.cached.filling import fill
from trl_refplug.providers.cached.missing_rows import RowBlock, find_missing, planned_blocks
from trl_refplug.providers.cached.row_keys import BatchRows, RowKeys, select_rows
from trl_refplug.providers.cached.sample_check import check_sample
from trl_refplug.providers.cached.source_probe import SourceProbe
from trl_refplug.providers.trainer_scoring import trainer_precision
from trl_refplug.rows import Row, Values
from trl_refplug.runtime.ranks import any_rank, min_over_ranks
from trl_refplug.store import LogProbStore


logger = logging.getLogger("trl_refplug")

_TOKENS_SHOWN = 12
_VERIFIED_ROWS = 4
_UNTIL_PUBLISHED = 30.0  # seconds; a store publishes the rows it gets within ten


class Filler:
    """
    Has the source score the rows that the store does not have.

    Args:
        context ([`ReferenceContext`]): The context of the run. The trainer is built.
        source ([`ReferenceProvider`]): The provider that scores.
        keys ([`RowKeys`]): Makes the keys of its rows.
        tolerance ([`Tolerance`]): How much a stored row may differ from the same row scored again.
        fill, verify: The options of `cached` with these names.

    Attributes:
        waits_for_training (`bool`): Whether `prepare` has to be called in `on_train_begin` and not in `setup`, because
            FSDP and DeepSpeed shard and cast a policy only then.
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
        self.probe = SourceProbe(context, source, tolerance)
        local = source.capabilities.local_model
        # If each rank has a part of the model, all ranks have to run it together.
        self._in_step = local and _shards_parameters(context.accelerator)
        kind = context.accelerator.distributed_type
        self.waits_for_training = local and fill == "ahead" and kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM")

    def prepare(self, store: LogProbStore) -> SampleCheck | None:
        """
        Look up all rows that training will ask for, score a few of those that are stored again, and score those that
        are missing.

        Returns:
            `SampleCheck` or `None`: How much the rows that were scored again differ from the stored ones; `None` if no
            row was.

        Raises:
            ConfigurationError: The option `verify` is set, and no row can be scored again.
            MissingRowError: A row is missing, and fill='never' forbids to score it.
            ReferenceMismatchError: The values in the store are not those of the source.
        """
        if self._verify and (obstacle := self._obstacle()):
            raise ConfigurationError(
                f"ref_provider='cached': verify={self._verify} has stored rows scored again at the start, and "
                f"{obstacle}. Remove the option, or set it to 0."
            )
        if self._context.planned("train") is None:
            return None  # this is fill='never': each batch is looked up when training asks for it
        accelerator = self._context.accelerator
        self.probe.compare_with(store)
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
            # One rank may see more rows in the store than others, but all have to do the same.
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
            self.probe.compare_with(store, scoring=True)
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
        Check that the store has all rows. Called when `prepare` is done on all ranks and the store was opened again.

        Raises:
            StoreError: This rank does not see rows that other ranks have scored.
        """
        left = find_missing(store, self._planned(), self._keys)
        until = time.monotonic() + _UNTIL_PUBLISHED
        # Another run may have scored them on the machine of another rank, and is about to publish them.
        while left.missing and time.monotonic() < until:
            time.sleep(2)
            store.refresh()
            left = find_missing(store, self._planned(), self._keys)
        if left.missing:
            raise StoreError(
                f"{len(left.missing):,} rows that other ranks have scored are not in {store.location!r} as rank "
                f"{self._context.accelerator.process_index} sees it. Use a `path` that all nodes share."
            )

    def score_missing(
        self, store: LogProbStore, batch: ReferenceBatch, rows: BatchRows, missing: list[int]
    ) -> list[Values]:
        """
        Score those rows of `batch` that `store` does not have, and return the values of each.

        Args:
            rows ([`BatchRows`]): The rows of `batch`.
            missing (`list[int]`): The indices of those that are missing.

        Raises:
            MissingRowError: They may not, or cannot, be scored now.
        """
        which = self._shown(rows.row(missing[0]))
        what = f"Row {missing[0]} of the batch, {which}, is not in the store {store.location!r}"
        if self._fill == "never" or self._in_step:
            raise MissingRowError(f"{what}. {self._why_not_scored()}")
        self._refuse_cast_policy()
        self.probe.compare_with(store, scoring=True)
        try:
            with trainer_precision(self._context.accelerator):
                log_probs = self._source.log_probs(select_rows(batch, missing))
        except MissingRowError as error:
            raise MissingRowError(f"{what}, and {error}") from None
        self.probe.refuse_moved_source(store)
        return list(rows.padded.select(missing).values_by_row(log_probs))

    def _refuse_cast_policy(self) -> None:
        """
        Refuse to score with a policy that transformers has cast in place, as it does for an evaluation outside of
        training.
        """
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
        """Why no stored row can be scored again now; an empty string if they can."""
        if self._context.planned("train") is None:
            return "the rows of this run are not known at the start"
        if self._source.unavailable:  # for example because training is resumed
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
    """Whether each rank has only a part of the policy. ZeRO-1 and ZeRO-2 do not divide its parameters."""
    if accelerator.distributed_type == "DEEPSPEED":
        return bool(accelerator.state.deepspeed_plugin.zero_stage == 3)
    return accelerator.distributed_type in ("FSDP", "MEGATRON_LM")
