"""
The model of a server: its identity, which rows it can score, and their log-probs.
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
from trl_refplug.serving.served_model import ServedModel, tokenizer_digest
from trl_refplug.serving.wire import PROTOCOL, ScoringRequest


_MAX_SCORERS = 8  # there is one for each temperature that was asked for last


@dataclass(frozen=True, eq=False)
class WorkUnit:
    """
    The smallest piece of work: a single row, or all rows of a request that have to be scored as they were sent.

    Args:
        rows ([`PaddedRows`]): One row without padding, or all rows of a request in their padding.
        temperature (`float`): Logits are divided by it.
        as_sent (`bool`): Whether the unit is a request that must be scored as it was sent, without other rows.
    """

    rows: PaddedRows
    temperature: float
    as_sent: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens to compute, including padding."""
        return len(self.rows) * self.rows.width

    @cached_property
    def key(self) -> bytes:
        """Units with the same key have the same log-probs. The digest is cryptographic, so no client can forge one."""
        rows = self.rows
        layout = (self.temperature, self.as_sent, rows.width, rows.padding_id, *rows.lefts, *map(len, rows.rows))
        content = [array.tobytes() for row in rows.rows for array in (row.input_ids, row.labels)]
        return hashlib.blake2b(repr(layout).encode() + b"".join(content), digest_size=16).digest()


class Engine:
    """
    Scores units of work with one model. `score` must be called on one thread at a time. All other methods can be
    called on any thread.

    Args:
        model (`nn.Module`): A causal language model on its device, possibly with a PEFT adapter.
        name (`str`): The name of the model, for people.
        scoring (`str`): `"exact"` scores every request as it was sent; `"packed"` merges the rows of all requests.
        token_budget (`int`, *optional*): Most tokens in a forward pass.
        tokenizer: The tokenizer of the model, if there is one.
        adapter (`str`, *optional*): The hub id or path of the adapter.
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
        self.served_model = ServedModel(
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
        self._scorer_for(1.0)  # make the first scorer now, and not while the first request waits

    def refusals(self, rows: PaddedRows) -> dict[int, str]:
        """The indices of the rows that this model cannot score, each with the reason."""
        vocab_size = self.served_model.vocab_size
        limit = self.served_model.max_length or float("inf")
        if self._scored_as_sent(rows) and self._absolute and rows.width > limit:
            # Padding counts as positions here. A position beyond the limit would make a GPU fail for all clients.
            return dict.fromkeys(
                range(len(rows)), f"it is padded to {rows.width:,} tokens; the model takes at most {limit:,}"
            )
        reasons = {}
        for index, (row, left) in enumerate(zip(rows.rows, rows.lefts, strict=True)):
            if not len(row):
                reasons[index] = "it is empty"
            elif row.input_ids.max() >= vocab_size:
                reasons[index] = f"token id {row.input_ids.max()} is not in the model's vocabulary of {vocab_size:,}"
            elif len(row) + (left if self._absolute else 0) > limit:
                reasons[index] = f"it has {len(row):,} tokens; the model takes at most {limit:,}"
        return reasons

    def work_units(self, request: ScoringRequest, indices: Sequence[int]) -> list[tuple[WorkUnit, list[int]]]:
        """The units of work for the rows at `indices`, each with the indices of the rows that it answers."""
        if not indices:
            return []
        rows, temperature = request.rows.select(indices), request.temperature
        if self._scored_as_sent(rows):
            rows = replace(rows, padding_id=min(rows.padding_id, self.served_model.vocab_size - 1))
            return [(WorkUnit(rows, temperature, as_sent=True), list(indices))]
        units = [
            (WorkUnit(PaddedRows.flush_left([r]), temperature), [i]) for i, r in zip(indices, rows.rows, strict=True)
        ]
        # Sorting makes rows with a common prefix neighbors, so that they are scored in one pass and share it.
        return sorted(units, key=lambda unit: unit[0].rows.rows[0].input_ids.astype(">i8").tobytes())

    def _scored_as_sent(self, rows: PaddedRows) -> bool:
        """Whether these rows have to be scored together and in their padding."""
        padding_counts = self._absolute and any(rows.lefts)
        return self.served_model.scoring == "exact" or padding_counts or rows.width > self._batch_limit

    def device_works(self) -> bool:
        """Whether the device can still compute. After some failures this process cannot use its GPU any more."""
        try:
            return torch.ones(1, device=self.device).sum().item() == 1
        except torch.OutOfMemoryError:
            return True
        except RuntimeError:
            return False

    def score(self, units: Sequence[WorkUnit]) -> Iterator[tuple[int, list[Values]]]:
        """
        Score units that have the same temperature: either one with `as_sent`, or any number without.

        Yields:
            `tuple[int, list[Values]]`: The index of a unit and the log-probs of its rows, as soon as they are known.
        """
        scorer = self._scorer_for(units[0].temperature)
        if units[0].as_sent:
            (unit,) = units
            log_probs = scorer.log_probs(unit.rows.to_batch(self.device))
            yield 0, list(unit.rows.values_by_row(log_probs))
            return
        for index, values in scorer.score_rows(unit.rows.rows[0] for unit in units):
            yield index, [values.numpy()]

    def _scorer_for(self, temperature: float) -> Scorer:
        # Exact scoring calls TRL's fused LM head, which replaces the model's `forward` and has a fixed temperature. So
        # each scorer has a `forward` of its own, which is put back in place whenever the scorer is used.
        self._inner.__dict__.pop("forward", None)
        if temperature not in self._scorers:
            if len(self._scorers) == _MAX_SCORERS:
                del self._scorers[next(iter(self._scorers))]
            scorer = Scorer(self._model, mode=self._mode, temperature=temperature, token_budget=self.token_budget)
            self._scorers[temperature] = scorer, self._inner.__dict__["forward"]
        scorer, self._inner.forward = self._scorers[temperature]
        return scorer
