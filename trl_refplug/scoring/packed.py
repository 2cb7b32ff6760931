"""
The packed way to score: from rows or a batch to forward passes over packs, and back to the answers of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.modes import evaluation_mode
from trl_refplug.models.positions import absolute_positions
from trl_refplug.models.sharding import forward_is_collective
from trl_refplug.provider import ReferenceBatch
from trl_refplug.rows import IGNORED, Ints, PaddedRows, Row, check_labels
from trl_refplug.runtime.memory import ran_out_of_memory
from trl_refplug.scoring import packable
from trl_refplug.scoring.attention import CannotPackError
from trl_refplug.scoring.execution import PackOutput, forward_pack
from trl_refplug.scoring.head import Head
from trl_refplug.scoring.layout import Pack, plan
from trl_refplug.scoring.operations import count_operations
from trl_refplug.scoring.stats import ScoreStats


class PackedPassError(Exception):
    """
    A packed forward pass failed, for another reason than a lack of memory. The text completes "because of".
    """


class PackedScorer:
    """
    Scores rows in packs, and knows which rows may be packed.

    Args:
        model (`nn.Module`): The model, possibly wrapped.
        head ([`Head`]): Turns its last hidden states into log-probs.
        budget (`int`): Most tokens in a forward pass. Halved when memory runs out.
        stats ([`ScoreStats`]): What is done is added to these counters.

    Attributes:
        config (`PretrainedConfig`), device (`torch.device`): Those of the model.
        limit (`float`), limit_reason (`str`): Most tokens, with padding, of rows that may be packed, and why not more.
        absolute_positions (`bool`): Whether padding on the left of a row changes its log-probs. The configuration
            tells, and verification may find out that it does even so.
        collective (`bool`): Whether all ranks have to make the same number of forward passes.
    """

    def __init__(self, model: nn.Module, head: Head, budget: int, stats: ScoreStats) -> None:
        inner = causal_lm(model)
        self.model = model
        self.budget = budget
        self.config: Any = inner.config
        self.device: torch.device = inner.get_input_embeddings().weight.device
        self.collective = forward_is_collective(model)
        self.limit, self.limit_reason = packable.length_limit(inner)
        # Where a forward pass is collective, TRL's head is used. While this rank packs, another one may have to score
        # its batch exactly, and both have to gather the same weights in the same order
        self._head = None if self.collective else head
        self._stats = stats
        self._cost = count_operations(inner)
        self.absolute_positions = absolute_positions(inner)

    def reason_not_to_pack(self) -> str | None:
        """
        Why no rows may be packed for this model, as a phrase that completes "because of"; `None` if no reason is
        known. The answer can change, as adapters are added to and removed from a model.
        """
        return packable.reason_not_to_pack(self.model, causal_lm(self.model))

    def check_labels(self, labels: Ints) -> None:
        """
        Refuse labels that the model does not know.

        Raises:
            UnsupportedInputError: A label is neither -100 nor a token id.
        """
        check_labels(labels, self.config.get_text_config().vocab_size)

    def unpad(self, batch: ReferenceBatch) -> PaddedRows:
        """
        Take the rows of a batch out of their padding.

        Raises:
            CannotPackError: For this batch, packed answers would not be the exact ones.
            UnsupportedInputError: A label is neither -100 nor a token id.
        """
        if not batch.extras:
            self.check_labels(batch.labels.cpu().numpy())
        try:
            padded = PaddedRows.from_batch(batch, own_labels=False)
        except ValueError as error:
            raise CannotPackError(str(error)) from None
        if padded.width > self.limit:
            raise CannotPackError(self.limit_reason)
        if self.absolute_positions and any(padded.lefts):
            raise CannotPackError("padding on the left of a model with absolute positions")
        return padded

    def plan(self, rows: Sequence[Row], budget: int | None) -> list[Pack]:
        """Lay rows out in packs, as [`layout.plan`] does, with the costs of this model."""
        return plan(rows, budget, self._cost)

    def score_pack(self, pack: Pack) -> PackOutput:
        """
        Make one forward pass over a pack.

        Raises:
            PackedPassError: The pass failed, or the model did not attend along the tree.
        """
        try:
            with evaluation_mode(self.model):
                return forward_pack(self.model, pack, self._head)
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            raise PackedPassError(describe_error(error)) from error

    def score_in_packs(self, rows: Sequence[Row]) -> Iterator[list[tuple[int, Tensor]]]:
        """
        Score rows, and give the answers of each forward pass as soon as it is done.

        Where forward passes are collective, this makes exactly one pass, even if there is nothing to score.

        Args:
            rows (`Sequence[Row]`): Rows that may be packed. Rows without a scored token get no answer.

        Yields:
            `list[tuple[int, Tensor]]`: The rows of one forward pass: the index of each in `rows`, and the log-probs of
            its scored tokens, in order: float32 or float64 `[scored]` on the CPU.

        Raises:
            PackedPassError: A forward pass failed. Rows that had no answer before that get none.
        """
        packs = self.plan(rows, None if self.collective else self.budget)
        if self.collective and not packs:
            placeholder = self.plan([Row(np.zeros(2, np.int64), np.array([IGNORED, 0]))], None)[0]
            packs.append(replace(placeholder, rows=(), answers=()))
        while packs:
            pack = packs.pop(0)
            try:
                output = self.score_pack(pack)
            except RuntimeError as error:
                one_row = len(pack.tokens) == pack.longest
                if self.collective or one_row or not ran_out_of_memory(error):
                    raise
                self.budget = max(1, min(self.budget, len(pack.tokens)) // 2)
                packs = list(self._replan(rows, [pack, *packs]))
                continue
            self._count(pack)
            values = output.log_probs.cpu()  # copied at once, as every copy waits for the device
            answers = (values[torch.from_numpy(answer)] for answer in pack.answers)
            yield list(zip(pack.rows, answers, strict=True))

    def _replan(self, rows: Sequence[Row], packs: Iterable[Pack]) -> Iterator[Pack]:
        """Lay the rows of `packs` out again, with the budget as it is now."""
        left = [index for pack in packs for index in pack.rows]
        for pack in self.plan([rows[index] for index in left], self.budget):
            yield replace(pack, rows=tuple(left[number] for number in pack.rows))

    def _count(self, pack: Pack) -> None:
        self._stats.forwards += 1
        self._stats.unique_tokens += len(pack.tokens)
        self._stats.scored_tokens += len(pack.targets)
        self._stats.operations += pack.operations(self._cost)


def describe_error(error: Exception) -> str:
    """Turn an exception into a phrase that completes "because of"."""
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, (CannotPackError, PackedPassError)):
        return first_line
    return f"{type(error).__name__}: {first_line}"
