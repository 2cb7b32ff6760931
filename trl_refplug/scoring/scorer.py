"""
The scorer: from a model and rows of tokens to per-token log-probabilities.
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
from trl_refplug.scoring.attention import CannotPackError
from trl_refplug.scoring.exact import ensure_fused_head, exact_log_probs
from trl_refplug.scoring.head import Head
from trl_refplug.scoring.packed import PackedPassError, PackedScorer
from trl_refplug.scoring.stats import ScoreStats
from trl_refplug.scoring.verification import verify


TOKEN_BUDGET = {"cpu": 8192}
"""By device type, most tokens in a forward pass by default: enough for a group of long rows to share its prompt."""

TOKEN_BUDGET_ELSEWHERE = 16384

WINDOW = 32
"""How many times the token budget is read ahead from a stream of rows, to plan their forward passes together."""


class ExactFallbackWarning(RefPlugWarning):
    """Rows that should have been packed are scored by the exact call. The text says why."""


def default_token_budget(device: torch.device) -> int:
    """Most tokens in a forward pass on `device`, unless it is told otherwise."""
    return TOKEN_BUDGET.get(device.type, TOKEN_BUDGET_ELSEWHERE)


class Scorer:
    """
    Scores rows of tokens with a causal language model.

    Rows are scored in evaluation mode, without gradients and without touching the global random state. Afterwards
    every module of the model is in the mode that it was in before. The model is called through its outermost
    `forward`, so it may be wrapped (PEFT, DDP, FSDP, DeepSpeed, accelerate's autocast). Only one thread at a time may
    score with a model.

    Args:
        model (`nn.Module`): The model. If it does not have TRL's fused LM head yet, it is added.
        mode (`str`): `"exact"` makes TRL's own call on the batch as it is, and gives the same numbers bit for bit.
            `"packed"` leaves out padding, computes shared prefixes and identical rows once, and applies the LM head to
            scored positions only; its numbers are the same up to rounding. Before the first packed answer, the two are
            compared on a few rows made of the first ones. If that comparison or a later packed pass fails, all rows
            from then on are scored exactly. So are rows for which packing is known to change the numbers. Either is
            said in an [`ExactFallbackWarning`].
        temperature (`float`): Logits are divided by it. If the model already has a fused LM head, this has to be the
            temperature that was given to it.
        token_budget (`int`, *optional*): Most tokens in one packed forward pass, or in one padded batch of
            [`~Scorer.score_rows`]. Halved when memory runs out. Defaults to 8,192 on CPU and 16,384 elsewhere.
        cast_lm_head_to_fp32 (`bool`): Project in float32, as TRL's flag of the same name does.

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
        head = Head.from_model(inner, temperature, cast_lm_head_to_fp32)
        self._packed = PackedScorer(model, head, token_budget or default_token_budget(self._device), self.stats)
        self._verified = False
        self._found_wrong: str | None = None  # by verification or a failed pass: why nothing is packed any more
        self._warned: set[str] = set()

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        """
        Score a batch.

        Args:
            batch ([`ReferenceBatch`]): Rows to score, padded on either side.

        Returns:
            `Tensor`: float32 `[batch, seq - 1]` on the batch's device. Entry `t` is the log-probability of
            `labels[:, t + 1]`, and 0 where that is -100. The caller may change the tensor.

        Raises:
            UnsupportedInputError: An adapter is active on the model's output embedding. In packed mode, a label is
                neither -100 nor a token id. Or a packed pass failed that all ranks make together, so that this rank
                cannot make an exact one instead.
        """
        check_output_embedding(self._model)
        check_token_ids(self._model, int(batch.input_ids.max()), int(batch.labels.max()))
        self.stats.rows += len(batch.input_ids)
        self.stats.padded_tokens += batch.input_ids.numel()
        with self._timed():
            if self.mode == "exact":
                return self._in_passes(batch)
            try:
                if reason := self._reason_not_to_pack(lambda: _token_ids(batch)):
                    raise CannotPackError(reason)
                return self._score_packed(batch)
            except CannotPackError as error:
                self._warn(str(error))
            except PackedPassError as error:
                self._stop_packing(error)
            # If passes are collective, every rank makes one pass here, whether it packs or not.
            return self._score_exactly(batch) if self._packed.collective else self._in_passes(batch)

    def score_rows(self, rows: Iterable[Row]) -> Iterator[tuple[int, Tensor]]:
        """
        Score a stream of rows, as many at a time as the token budget allows.

        Rows are read ahead in windows of 32 times the token budget, and reordered within a window: packed mode brings
        rows with common prefixes together, exact mode rows of similar length. Answers are given as soon as their
        forward pass is done, so they do not come in the order of `rows`.

        Args:
            rows (`Iterable[Row]`): Any number of rows.

        Yields:
            `tuple[int, Tensor]`: The index of a row in `rows`, and the log-probabilities of its scored tokens, in
            order: float32 `[scored]` on the CPU. Every row comes exactly once.

        Raises:
            UnsupportedInputError: The model is distributed over ranks, or a label is neither -100 nor a token id.
        """
        return chain.from_iterable(self.score_passes(rows))

    def score_passes(self, rows: Iterable[Row]) -> Iterator[list[tuple[int, Tensor]]]:
        """The same as [`~Scorer.score_rows`], but with the answers of each forward pass together in a list."""
        if self._packed.collective:
            raise UnsupportedInputError(
                "Found a model distributed over ranks (FSDP, DeepSpeed ZeRO-3 or DDP), expected one that a rank can "
                "run on its own: score_rows makes a different number of forward passes on each rank. Use log_probs."
            )
        check_output_embedding(self._model)
        for first, window in _windows(rows, WINDOW * self._packed.budget):
            self._packed.check_labels(np.concatenate([row.labels for row in window]))
            largest = (max(int(ids.max(initial=0)) for ids in column) for column in _columns(window))
            check_token_ids(self._model, *largest)
            self.stats.rows += len(window)
            self.stats.padded_tokens += sum(map(len, window))
            passes = self._score_window(window)
            while True:
                with self._timed():  # only this pass, without what the caller does between passes
                    scored = next(passes, None)
                if scored is None:
                    break
                yield [(first + index, values.float()) for index, values in scored]

    def _score_window(self, rows: list[Row]) -> Iterator[list[tuple[int, Tensor]]]:
        """For each forward pass, the indices of its rows in `rows` and the log-probs of their scored tokens."""
        pending = [index for index, row in enumerate(rows) if len(row.scored)]
        if len(pending) < len(rows):
            yield [(index, torch.zeros(0)) for index in sorted(set(range(len(rows))) - set(pending))]
        packed = self._rows_to_pack(rows, pending) if self.mode == "packed" else []
        to_pack = [rows[index] for index in packed]
        left = set(packed)
        try:
            for scored in self._packed.score_in_packs(to_pack) if packed else ():
                left.difference_update(packed[number] for number, _ in scored)
                yield [(packed[number], values) for number, values in scored]
        except PackedPassError as error:
            self._stop_packing(error)
        batches = self._exact_batches(rows, set(pending).difference(packed) | left)
        while batches:
            together = batches.pop(0)
            padded = PaddedRows.flush_left([rows[index] for index in together])
            try:
                log_probs = self._score_exactly(padded.to_batch(self._device))
            except RuntimeError as error:
                if len(together) == 1 or not ran_out_of_memory(error):
                    raise
                self._packed.budget = len(rows[together[0]]) * len(together) // 2
                batches = self._exact_batches(rows, chain(together, *batches))
                continue
            yield list(zip(together, map(torch.from_numpy, padded.values_by_row(log_probs)), strict=True))

    def _exact_batches(self, rows: list[Row], indices: Iterable[int]) -> list[list[int]]:
        """Group the rows at `indices` by similar length for the exact call, longest first, within the token budget."""
        batches = []
        order = sorted(indices, key=lambda index: (-len(rows[index]), index))
        while order:
            together = max(1, self._packed.budget // len(rows[order[0]]))
            batches.append(order[:together])
            order = order[together:]
        return batches

    def _rows_to_pack(self, rows: list[Row], pending: list[int]) -> list[int]:
        """Those of the pending rows that may be packed. Warns if some may not."""
        if not pending:
            return []
        if reason := self._reason_not_to_pack(lambda: [rows[index].input_ids for index in pending]):
            self._warn(reason)
            return []
        short = [index for index in pending if len(rows[index]) <= self._packed.limit]
        if len(short) < len(pending):
            self._warn(self._packed.limit_reason)
        return short

    def _reason_not_to_pack(self, rows: Callable[[], Sequence[Ints]]) -> str | None:
        """
        Why nothing may be packed now. Called for the first time, it compares packed with exact answers.

        Args:
            rows (`Callable[[], Sequence[np.ndarray]]`): Gives token ids of rows, to make that comparison with.

        Returns:
            `str` or `None`: A phrase that completes "because of"; `None` if rows may be packed.
        """
        reason = self._packed.reason_not_to_pack()
        if reason is None and not self._verified:
            self._found_wrong = verify(self._packed, rows())
            self._verified = True
        return reason or self._found_wrong

    def _stop_packing(self, error: PackedPassError) -> None:
        """
        From now on score everything exactly, because a packed pass failed.

        Raises:
            UnsupportedInputError: Other ranks take part in the pass, so that this one cannot score exactly instead.
        """
        if self._packed.collective:
            raise UnsupportedInputError(
                f"A packed forward pass failed because of {error}; expected it to succeed, as it is made by all ranks "
                "together and this one cannot score exactly by itself. Use scoring='exact'."
            ) from error
        self._found_wrong = str(error)
        self._warn(self._found_wrong)

    def _score_packed(self, batch: ReferenceBatch) -> Tensor:
        padded = self._packed.unpad(batch)
        values: list[Values | None] = [None] * len(padded)
        for index, scored in chain.from_iterable(self._packed.score_in_packs(padded.rows)):
            values[index] = scored.float().numpy()
        return padded.to_log_probs(values).to(batch.labels.device)

    def _in_passes(self, batch: ReferenceBatch) -> Tensor:
        answers = [self._score_exactly(part) for part in batch.in_passes()]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _score_exactly(self, batch: ReferenceBatch) -> Tensor:
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
    """Cut a stream into windows of at least `tokens` tokens. Each comes with the index of its first row."""
    first, window, size = 0, [], 0
    for row in rows:
        window.append(row)
        size += len(row)
        if size >= tokens:
            yield first, window
            first, window, size = first + len(window), [], 0
    if window:
        yield first, window
