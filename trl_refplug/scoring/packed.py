"""
Packed scoring: from rows, or a batch, to forward passes over packs and back.
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
from trl_refplug.scoring import safety
from trl_refplug.scoring.attention import UnsafeError
from trl_refplug.scoring.execution import Scored, run_pack
from trl_refplug.scoring.head import Head
from trl_refplug.scoring.layout import Pack, plan
from trl_refplug.scoring.operations import count_operations
from trl_refplug.scoring.stats import ScoreStats


class PackedError(Exception):
    """A packed forward pass failed, other than for want of memory; the text completes "because of"."""


class PackedPass:
    """
    Args:
        model (`nn.Module`): The model, however wrapped.
        head ([`Head`]): What comes after its last hidden state.
        budget (`int`): Most tokens in a forward pass; halved when memory runs out.
        stats ([`ScoreStats`]): Counts are added to it.

    Attributes:
        config (`PretrainedConfig`), device (`torch.device`): Of the model.
        limit (`float`), limit_reason (`str`): The longest rows, padded, that may be packed, and why.
        absolute (`bool`): Whether padding on its left changes a row's log-probs. Verification may find that it does.
        lockstep (`bool`): Whether every rank has to make as many forward passes as this one.
    """

    def __init__(self, model: nn.Module, head: Head, budget: int, stats: ScoreStats) -> None:
        inner = causal_lm(model)
        self.model = model
        self.budget = budget
        self.config: Any = inner.config
        self.device: torch.device = inner.get_input_embeddings().weight.device
        self.lockstep = forward_is_collective(model)
        self.limit, self.limit_reason = safety.length_limit(inner)
        # Where a pass is a collective operation TRL's own: a rank that packs may meet one that has to score exactly
        self._head = None if self.lockstep else head
        self._stats = stats
        self._cost = count_operations(inner)
        self.absolute = absolute_positions(inner)

    def unsafe_model(self) -> str | None:
        """Why no rows may be packed, as a phrase that completes "because of". Asked anew: adapters come and go."""
        return safety.unsafe_model(self.model, causal_lm(self.model))

    def check(self, labels: Ints) -> None:
        """
        Raises:
            UnsupportedInputError: A label is not a token id.
        """
        check_labels(labels, self.config.get_text_config().vocab_size)

    def cut(self, batch: ReferenceBatch) -> PaddedRows:
        """
        The rows of a batch.

        Raises:
            UnsafeError: Packed, this batch would not give the exact call's numbers.
            UnsupportedInputError: A label is not a token id.
        """
        if not batch.extras:
            self.check(batch.labels.cpu().numpy())
        try:
            padded = PaddedRows.from_batch(batch, own_labels=False)
        except ValueError as error:
            raise UnsafeError(str(error)) from None
        if padded.width > self.limit:
            raise UnsafeError(self.limit_reason)
        if self.absolute and any(padded.lefts):
            raise UnsafeError("padding on the left of a model with absolute positions")
        return padded

    def plan(self, rows: Sequence[Row], budget: int | None) -> list[Pack]:
        """[`plan`] with the cost of this model."""
        return plan(rows, budget, self._cost)

    def score(self, pack: Pack) -> Scored:
        """
        One forward pass.

        Raises:
            PackedError: It failed; or it did not attend along the tree.
        """
        try:
            with evaluation_mode(self.model):
                return run_pack(self.model, pack, self._head)
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            raise PackedError(why(error)) from error

    def run(self, rows: Sequence[Row]) -> Iterator[list[tuple[int, Tensor]]]:
        """
        Score rows, forward pass by forward pass.

        In lockstep with other ranks, that is exactly one forward pass, even when there is nothing to score.

        Yields:
            `list[tuple[int, Tensor]]`: Of one forward pass, the index of every row and the values of its scored
            positions, in order, on the CPU. Rows without one are left out.

        Raises:
            PackedError: A forward pass failed. What was not yielded before is not scored.
        """
        packs = self.plan(rows, None if self.lockstep else self.budget)
        if self.lockstep and not packs:
            idle = self.plan([Row(np.zeros(2, np.int64), np.array([IGNORED, 0]))], None)[0]
            packs.append(replace(idle, rows=(), answers=()))
        while packs:
            pack = packs.pop(0)
            try:
                scored = self.score(pack)
            except RuntimeError as error:
                alone = len(pack.tokens) == pack.longest
                if self.lockstep or alone or not ran_out_of_memory(error):
                    raise
                self.budget = max(1, min(self.budget, len(pack.tokens)) // 2)
                packs = list(self._replan(rows, [pack, *packs]))
                continue
            self._count(pack)
            values = scored.log_probs.cpu()  # once: every row by itself would wait for the device
            answers = (values[torch.from_numpy(answer)] for answer in pack.answers)
            yield list(zip(pack.rows, answers, strict=True))

    def _replan(self, rows: Sequence[Row], packs: Iterable[Pack]) -> Iterator[Pack]:
        left = [index for pack in packs for index in pack.rows]
        for pack in self.plan([rows[index] for index in left], self.budget):
            yield replace(pack, rows=tuple(left[number] for number in pack.rows))

    def _count(self, pack: Pack) -> None:
        self._stats.forwards += 1
        self._stats.unique_tokens += len(pack.tokens)
        self._stats.scored_tokens += len(pack.targets)
        self._stats.operations += pack.operations(self._cost)


def why(error: Exception) -> str:
    """An exception as a phrase that completes "because of"."""
    first_line = (str(error).splitlines() or [""])[0]
    return first_line if isinstance(error, (UnsafeError, PackedError)) else f"{type(error).__name__}: {first_line}"
