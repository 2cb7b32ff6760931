"""The provider `example`: the policy as it was passed in, made sharper or flatter."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from trl_refplug import ReferenceBatch, ReferenceContext, ReferenceIdentity, ReferenceProvider, digest_model

from refplug_example.options import CAPABILITIES, ExampleOptions


class ExampleProvider(ReferenceProvider):
    """Scores with a copy of the policy."""

    Options = ExampleOptions
    capabilities = CAPABILITIES
    options: ExampleOptions

    def pin(self, context: ReferenceContext) -> nn.Module:
        # The policy is exactly as it was passed in. What is seen later need not be the start of training.
        policy: Any = context.policy
        adapter = policy.active_adapter if hasattr(policy, "peft_config") else None
        self._digest = digest_model(policy, adapter)
        return copy.deepcopy(context.policy)  # for TRL to place: device, DeepSpeed, FSDP

    def declared_model(self, context: ReferenceContext) -> AbstractContextManager[nn.Module | None]:
        # Training asks the reference about a few rows now and then, and compares its answers with what the model that
        # pin() returned says about them. Sharpened, the reference says something else.
        return super().declared_model(context) if self.options.sharpness == 1 else nullcontext()

    def setup(self, context: ReferenceContext) -> None:
        assert context.reference_model is not None  # what pin() returned, placed
        self._model = context.reference_model
        self._model.eval()
        self._temperature = context.temperature

    def identity(self) -> ReferenceIdentity:
        # All that changes a value, and nothing else.
        sharpness = self.options.sharpness
        return ReferenceIdentity("example", f"{self._digest}-{sharpness}", {"sharpness": sharpness})

    @torch.no_grad()
    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        logits = self._model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **batch.extras
        ).logits[:, :-1]
        log_probs = (logits.float() * (self.options.sharpness / self._temperature)).log_softmax(-1)
        targets = batch.labels[:, 1:]
        chosen = log_probs.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        return torch.where(targets != -100, chosen, 0.0)
