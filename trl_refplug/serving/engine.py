"""
The model behind a server: what it is, which rows it takes, and their log-probabilities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.identity import digest_model
from trl_refplug.models.output_embedding import check_output_embedding
from trl_refplug.models.positions import absolute_positions, batch_length_limit
from trl_refplug.rows import PaddedRows, Values
from trl_refplug.scoring import Scorer, default_token_budget
from trl_refplug.serving.served_model import ServerFacts, tokenizer_digest
from trl_refplug.serving.wire import PROTOCOL, ScoringRequest


_TEMPERATURES = 8  # scorers kept, one a temperature


@dataclass(frozen=True, eq=False)
class Unit:
    """
    What is scored together or not at all: one row, or a request that has to be scored as it was sent.

    Args:
        rows ([`PaddedRows`]): One row without padding, or all of a request in their padding.
        temperature (`float`): Logits are divided by it.
        whole (`bool`): Whether it must not be merged with others.
    """

    rows: PaddedRows
    temperature: float
    whole: bool = False

    @property
    def tokens(self) -> int:
        """Tokens to compute, with padding where there is any."""
        return len(self.rows) * self.rows.width

    @cached_property
    def key(self) -> bytes:
        """Units with the same key have the same values, whatever a client makes up."""
        rows = self.rows
        layout = (self.temperature, self.whole, rows.width, rows.padding_id, *rows.lefts, *map(len, rows.rows))
        content = [array.tobytes() for row in rows.rows for array in (row.input_ids, row.labels)]
        return hashlib.blake2b(repr(layout).encode() + b"".join(content), digest_size=16).digest()


class Engine:
    """
    Scores units with one model. All but the constructor and `score` may be called from any thread.

    Args:
        model (`nn.Module`): A causal language model on its device, possibly with a PEFT adapter.
        name (`str`): What it is called, for people.
        scoring (`str`): `"exact"`: every request as it was sent. `"packed"`: rows of all requests merged.
        token_budget (`int`, *optional*): Most tokens of a forward pass.
        tokenizer: Its tokenizer, if there is one.
        adapter (`str`, *optional*): Where its adapter came from.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        scoring: Literal["exact", "packed"] = "packed",
        token_budget: int | None = None,
        tokenizer: Any = None,
        adapter: str | None = None,
    ) -> None:
        self._model: Any = model
        inner: Any = causal_lm(model)
        self._inner = inner
        self.device = inner.get_input_embeddings().weight.device
        self.token_budget = token_budget or default_token_budget(self.device)
        self._mode: Literal["exact", "packed"] = scoring
        self._scorers: dict[float, tuple[Scorer, Any]] = {}
        self._absolute = absolute_positions(inner)
        self._batch_limit = batch_length_limit(inner)
        active: Any = getattr(model, "active_adapter", None) if hasattr(model, "peft_config") else None
        self.facts = ServerFacts(
            protocol=PROTOCOL,
            digest=digest_model(model, adapter=active),
            model=name,
            adapter=adapter,
            dtype=str(inner.dtype).removeprefix("torch."),
            scoring=scoring,
            vocab_size=min(len(e.weight) for e in (inner.get_input_embeddings(), inner.get_output_embeddings())),
            tokenizer=tokenizer_digest(tokenizer),
            max_length=getattr(inner.config.get_text_config(), "max_position_embeddings", None),
        )
        check_output_embedding(model)
        self._scorer(1.0)  # now, not when the first request waits

    def refused(self, rows: PaddedRows) -> dict[int, str]:
        """Which rows this model cannot score, and why."""
        facts = self.facts
        limit = facts.max_length or float("inf")
        if self._in_its_padding(rows) and self._absolute and rows.width > limit:
            # Position by position through the padding: beyond the limit a GPU fails for good, and for everyone
            return dict.fromkeys(
                range(len(rows)), f"it is padded to {rows.width:,} tokens; the model takes at most {limit:,}"
            )
        reasons = {}
        for index, (row, left) in enumerate(zip(rows.rows, rows.lefts, strict=True)):
            if not len(row):
                reasons[index] = "it is empty"
            elif row.input_ids.max() >= facts.vocab_size:
                reasons[index] = (
                    f"token id {row.input_ids.max()} is not in the model's vocabulary of {facts.vocab_size:,}"
                )
            elif len(row) + (left if self._absolute else 0) > limit:
                reasons[index] = f"it has {len(row):,} tokens; the model takes at most {limit:,}"
        return reasons

    def units(self, request: ScoringRequest, indices: Sequence[int]) -> list[tuple[Unit, list[int]]]:
        """The work that the rows at `indices` make, each unit with the rows that it answers."""
        if not indices:
            return []
        rows, temperature = request.rows.select(indices), request.temperature
        if self._in_its_padding(rows):
            rows = replace(rows, padding_id=min(rows.padding_id, self.facts.vocab_size - 1))
            return [(Unit(rows, temperature, whole=True), list(indices))]
        units = [(Unit(PaddedRows.flush_left([r]), temperature), [i]) for i, r in zip(indices, rows.rows, strict=True)]
        # Rows with common prefixes become neighbours, so that they stay together in one pass
        return sorted(units, key=lambda unit: unit[0].rows.rows[0].input_ids.astype(">i8").tobytes())

    def _in_its_padding(self, rows: PaddedRows) -> bool:
        """Whether rows are scored as they were sent."""
        padding_counts = self._absolute and any(rows.lefts)
        return self.facts.scoring == "exact" or padding_counts or rows.width > self._batch_limit

    def works(self) -> bool:
        """Whether the device still computes. After some failures a GPU does not, in this process."""
        try:
            return torch.ones(1, device=self.device).sum().item() == 1
        except torch.OutOfMemoryError:
            return True
        except RuntimeError:
            return False

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[int, list[Values]]]:
        """
        Score units of one temperature: one that is whole, or any number that are not. One thread at a time.

        Yields:
            `tuple[int, list[Values]]`: The index of a unit and the values of its rows, as soon as they are there.
        """
        scorer = self._scorer(units[0].temperature)
        if units[0].whole:
            (unit,) = units
            log_probs = scorer.log_probs(unit.rows.to_batch(self.device))
            yield 0, list(unit.rows.values_by_row(log_probs))
            return
        for index, values in scorer.score_rows(unit.rows.rows[0] for unit in units):
            yield index, [values.numpy()]

    def _scorer(self, temperature: float) -> Scorer:
        # TRL's fused head, which exact scoring calls, has its temperature built in; it is the model's `forward`
        self._inner.__dict__.pop("forward", None)
        if temperature not in self._scorers:
            if len(self._scorers) == _TEMPERATURES:
                del self._scorers[next(iter(self._scorers))]
            scorer = Scorer(self._model, mode=self._mode, temperature=temperature, token_budget=self.token_budget)
            self._scorers[temperature] = scorer, self._inner.__dict__["forward"]
        scorer, self._inner.forward = self._scorers[temperature]
        return scorer
