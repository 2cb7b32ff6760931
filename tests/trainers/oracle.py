"""
What a model answers, known without the package: ordinary logits of a deep copy, and a log-softmax.

This file imports nothing of ours, so that no mistake of ours can be in it, too.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Truth:
    """
    The log-probs of `model` as it is now, whatever becomes of it later.

    Args:
        model: A transformers model or a `PeftModel`.
        disabled (`bool`): Whether its adapters are left out: what is declared is the base.
        adapter (`str`, *optional*): The adapter that is declared, if it is not the active one.
        temperature (`float`): Logits are divided by it.
        autocast (`bool`): Whether the run computes under bfloat16 autocast.
    """

    def __init__(
        self,
        model: Any,
        *,
        disabled: bool = False,
        adapter: str | None = None,
        temperature: float = 1.0,
        autocast: bool = False,
    ) -> None:
        self.model = copy.deepcopy(model).eval()
        if adapter is not None:
            self.model.set_adapter(adapter)
        self.disabled = disabled
        self.temperature = temperature
        self.autocast = autocast

    def log_probs(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """float64 `[batch, seq - 1]`, zero where the next label is -100."""
        casts = torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()
        with torch.no_grad(), torch.random.fork_rng(), self._declared(), casts:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        logits = logits[:, -input_ids.shape[1] :].double() / self.temperature  # behind the virtual tokens of a prompt
        targets = labels[:, 1:]
        scored = targets != -100
        answers = logits[:, :-1].log_softmax(-1).gather(-1, targets.masked_fill(~scored, 0)[..., None])[..., 0]
        return answers.masked_fill(~scored, 0.0)

    def _declared(self) -> AbstractContextManager[Any]:
        if not self.disabled:
            return nullcontext()
        return self.model.disable_adapter()  # type: ignore[no-any-return]
