"""What decides, besides a model's identity, which of its values may be stored and found again."""

from __future__ import annotations

import math

from torch import nn

from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.positions import absolute_positions, batch_length_limit
from trl_refplug.provider import ModelTraits


def traits_of(model: nn.Module) -> ModelTraits:
    """The traits of a causal LM, however it is wrapped."""
    inner = causal_lm(model)
    limit = batch_length_limit(inner)
    return ModelTraits(
        attention_implementation=str(inner.config._attn_implementation),
        absolute_positions=absolute_positions(inner),
        length_limit=int(limit) if math.isfinite(limit) else None,
        dtype=str(inner.dtype).removeprefix("torch."),
    )
