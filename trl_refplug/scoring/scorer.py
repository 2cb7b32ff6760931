"""
From rows and a model to per-token log-probabilities.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from trl_refplug.errors import RefPlugWarning, UnsupportedInputError
from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.modes import evaluation_mode
from trl_refplug.models.output_embedding import check_output_embedding, check_token_ids
from trl_refplug.provider import ReferenceBatch
from trl_refplug.rows import IGNORED, Ints, PaddedRows, Row, Values
from trl_refplug.runtime.memory import ran_out_of_memory
from trl_refplug.scoring.attention import UnsafeError
from trl_refplug.scoring.exact import ensure_fused_head, exact_log_probs
from trl_refplug.scoring.head import Head
from trl_refplug.scoring.packed import PackedError, PackedPass
from trl_refplug.scoring.stats import ScoreStats
from trl_refplug.scoring.verification import verify


TOKEN_BUDGET = {"cpu": 8192}
"""Tokens of a forward pass, by device type: room for a group of long rows to share its prompt."""

TOKEN_BUDGET_ELSEWHERE = 16384

WINDOW = 32
"""How many forward passes' worth of a stream of rows is planned together."""


class ExactFallbackWarning(RefPlugWarning):
    """Rows that were to be scored packed are scored by the exact call; the text says why."""


class Scorer:
    """
    Scores rows with a causal language model.

    Rows are scored in evaluation mode, without gradient and without touching the global random state; whatever mode
    the model's modules were in is restored. The model is entered through its outermost `forward`, so it may be wrapped
    (PEFT, DDP, FSDP, DeepSpeed, accelerate's autocast). A model is scored by one thread at a time.

    Args:
        model (`nn.Module`): The model. It is given TRL's fused LM head if it has none.
        mode (`str`): `"exact"`: TRL's own call on the batch as it is, bit for bit. `"packed"`: no padding, shared
            prefixes and identical rows computed once, the LM head on scored positions only; equal within rounding.
            Before the first packed answer both ways are compared, on rows made of the first ones. Where packing is
            known to change the numbers, and for good if that comparison or a packed pass fails, rows are scored
            exactly, with an [`ExactFallbackWarning`].
        temperature (`float`): Logits are divided by it. If the model already has a fused LM head, this has to be the
            temperature that was given to it.
        token_budget (`int`, *optional*): Most tokens in one packed forward pass, or in one padded batch of
            [`~Scorer.score_rows`]. Halved when memory runs out. Defaults to 8,192 on CPU and 16,384 elsewhere.
        cast_lm_head_to_fp32 (`bool`): Project in float32, as TRL's flag of the same name.

    Attributes:
        stats ([`ScoreStats`]): What has been done so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: Literal["exact", "packed"] = "exact",
        temperature: float = 1.0,
        token_budget: int | None = None,
        cast_lm_head_to_fp32: bool = False,
    ) -> None:
        if mode not in ("exact", "packed"):
            raise ValueError(f"Found mode={mode!r}, expected 'exact' or 'packed'.")
        if token_budget is not None and token_budget < 1:
            raise ValueError(f"Found token_budget={token_budget}, expected at least 1 token.")
        ensure_fused_head(model, temperature, cast_lm_head_to_fp32)
        inner = causal_lm(model)
        self.mode = mode
        self.stats = ScoreStats()
        self._model = model
        self._device: torch.device = inner.get_input_embeddings().weight.device
        budget = token_budget or TOKEN_BUDGET.get(self._device.type, TOKEN_BUDGET_ELSEWHERE)
        head = Head.of(inner, temperature, cast_lm_head_to_fp32)
        self._packed = PackedPass(model, head, budget, self.stats)
        self._verified = False
        self._distrusted: str | None = None
        self._warned: set[str] = set()

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        """
        Score a batch.

        Args:
            batch ([`ReferenceBatch`]): Rows to score, padded on either side.

        Returns:
            `Tensor`: float32 `[batch, seq - 1]`, on the batch's device and the caller's to change: entry `t` is the
            log-probability of `labels[:, t + 1]`, 0 where that is -100.

        Raises:
            UnsupportedInputError: An adapter is active on the model's output embedding. Packed, a label is not a token
                id; or a packed pass failed where every rank has to take part in it, so that this one cannot make
                another instead.
        """
        check_output_embedding(self._model)
        check_token_ids(self._model, int(batch.input_ids.max()), int(batch.labels.max()))
        self.stats.rows += len(batch.input_ids)
        self.stats.padded_tokens += batch.input_ids.numel()
        with self._timed():
            if self.mode == "exact":
                return self._in_passes(batch)
            try:
                if reason := self._untrusted(lambda: _token_ids(batch)):
                    raise UnsafeError(reason)
                return self._pack(batch)
            except UnsafeError as error:
                self._warn(str(error))
            except PackedError as error:
                self._distrust(error)
            # In lockstep every rank makes one pass, whether it packs or not
            return self._exact(batch) if self._packed.lockstep else self._in_passes(batch)

    def score_rows(self, rows: Iterable[Row]) -> Iterator[tuple[int, Tensor]]:
        """
        Score a stream of rows, as many at a time as the token budget allows.

        Rows are read ahead by a bounded window (32 forward passes' worth) and reordered within it: those with common
        prefixes come together when packing, those of similar length when padding. An answer is there as soon as its
        forward pass is done, so answers do not come in the order of `rows`.

        Args:
            rows (`Iterable[Row]`): Any number of rows.

        Yields:
            `tuple[int, Tensor]`: The index of a row and the log-probabilities of its scored tokens, in order: float32
            `[scored]` on the CPU. Every row once.

        Raises:
            UnsupportedInputError: The model is distributed over ranks, or a label is not a token id.
        """
        return chain.from_iterable(self.score_passes(rows))

    def score_passes(self, rows: Iterable[Row]) -> Iterator[list[tuple[int, Tensor]]]:
        """[`score_rows`] with the answers of one forward pass together, as soon as it is done."""
        if self._packed.lockstep:
            raise UnsupportedInputError(
                "Found a model distributed over ranks (FSDP, DeepSpeed ZeRO-3 or DDP), expected one that a rank can "
                "run on its own: score_rows makes a different number of forward passes on each rank. Use log_probs."
            )
        check_output_embedding(self._model)
        for first, window in _windows(rows, WINDOW * self._packed.budget):
            self._packed.check(np.concatenate([row.labels for row in window]))
            largest = (max(int(ids.max(initial=0)) for ids in column) for column in _columns(window))
            check_token_ids(self._model, *largest)
            self.stats.rows += len(window)
            self.stats.padded_tokens += sum(map(len, window))
            passes = self._score_window(window)
            while True:
                with self._timed():  # not the caller's work in between
                    scored = next(passes, None)
                if scored is None:
                    break
                yield [(first + index, values.float()) for index, values in scored]

    def _score_window(self, rows: list[Row]) -> Iterator[list[tuple[int, Tensor]]]:
        """The scored values of each row, by its index, forward pass by forward pass."""
        pending = [index for index, row in enumerate(rows) if len(row.scored)]
        if len(pending) < len(rows):
            yield [(index, torch.zeros(0)) for index in sorted(set(range(len(rows))) - set(pending))]
        packed = self._packable(rows, pending) if self.mode == "packed" else []
        to_pack = [rows[index] for index in packed]
        left = set(packed)
        try:
            for scored in self._packed.run(to_pack) if packed else ():
                left.difference_update(packed[number] for number, _ in scored)
                yield [(packed[number], values) for number, values in scored]
        except PackedError as error:
            self._distrust(error)
        batches = self._padded(rows, set(pending).difference(packed) | left)
        while batches:
            together = batches.pop(0)
            padded = PaddedRows.flush_left([rows[index] for index in together])
            try:
                log_probs = self._exact(padded.batch(self._device))
            except RuntimeError as error:
                if len(together) == 1 or not ran_out_of_memory(error):
                    raise
                self._packed.budget = len(rows[together[0]]) * len(together) // 2
                batches = self._padded(rows, chain(together, *batches))
                continue
            yield list(zip(together, map(torch.from_numpy, padded.gather(log_probs)), strict=True))

    def _padded(self, rows: list[Row], indices: Iterable[int]) -> list[list[int]]:
        """Batches of rows of similar length for the exact call, the longest first, none larger than the budget."""
        batches = []
        order = sorted(indices, key=lambda index: (-len(rows[index]), index))
        while order:
            together = max(1, self._packed.budget // len(rows[order[0]]))
            batches.append(order[:together])
            order = order[together:]
        return batches

    def _packable(self, rows: list[Row], pending: list[int]) -> list[int]:
        """Which of the pending rows to pack."""
        if not pending:
            return []
        if reason := self._untrusted(lambda: [rows[index].input_ids for index in pending]):
            self._warn(reason)
            return []
        short = [index for index in pending if len(rows[index]) <= self._packed.limit]
        if len(short) < len(pending):
            self._warn(self._packed.limit_reason)
        return short

    def _untrusted(self, rows: Callable[[], Sequence[Ints]]) -> str | None:
        """Why nothing may be packed now. The first time, packed answers are compared with the exact call's."""
        reason = self._packed.unsafe_model()
        if reason is None and not self._verified:
            self._distrusted = verify(self._packed, rows())
            self._verified = True
        return reason or self._distrusted

    def _distrust(self, error: PackedError) -> None:
        """Pack no more."""
        if self._packed.lockstep:
            raise UnsupportedInputError(
                f"A packed forward pass failed because of {error}; expected it to succeed, as it is made by all ranks "
                "together and this one cannot score exactly by itself. Use scoring='exact'."
            ) from error
        self._distrusted = str(error)
        self._warn(self._distrusted)

    def _pack(self, batch: ReferenceBatch) -> Tensor:
        padded = self._packed.cut(batch)
        values: list[Values | None] = [None] * len(padded)
        for index, scored in chain.from_iterable(self._packed.run(padded.rows)):
            values[index] = scored.float().numpy()
        return padded.place(values).to(batch.labels.device)

    def _in_passes(self, batch: ReferenceBatch) -> Tensor:
        answers = [self._exact(part) for part in batch.in_passes()]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _exact(self, batch: ReferenceBatch) -> Tensor:
        with evaluation_mode(self._model):
            log_probs = exact_log_probs(self._model, batch).to(batch.labels.device)
        self.stats.forwards += 1
        self.stats.unique_tokens += batch.input_ids.numel()
        self.stats.scored_tokens += int((batch.labels[:, 1:] != IGNORED).sum())
        return log_probs

    def _warn(self, reason: str) -> None:
        self.stats.fallback = reason
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"Scoring exactly (TRL's own call) instead of packed, because of {reason}.",
                ExactFallbackWarning,
                stacklevel=3,
            )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stats.seconds += time.perf_counter() - start


def _token_ids(batch: ReferenceBatch) -> list[Ints]:
    rows = zip(batch.input_ids.cpu().numpy(), batch.attention_mask.cpu().numpy(), strict=True)
    return [ids[mask != 0] for ids, mask in rows]


def _columns(rows: Iterable[Row]) -> tuple[list[Ints], list[Ints]]:
    """The token ids of all rows, and their labels."""
    return [row.input_ids for row in rows], [row.labels for row in rows]


def _windows(rows: Iterable[Row], tokens: int) -> Iterator[tuple[int, list[Row]]]:
    """Consecutive rows of some `tokens` tokens together, each time with the index of the first."""
    first, window, size = 0, [], 0
    for row in rows:
        window.append(row)
        size += len(row)
        if size >= tokens:
            yield first, window
            first, window, size = first + len(window), [], 0
    if window:
        yield first, window
