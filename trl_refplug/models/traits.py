"""Read the traits of a loaded model that decide, besides its identity, which of its values can be found in a store."""

from __future__ import annotations

import math

from torch import nn

from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.positions import absolute_positions, batch_length_limit
from trl_refplug.provider import ModelTraits


def traits_of(model: nn.Module) -> ModelTraits:
    """The traits of the causal LM in `model`, which may be wrapped."""
    inner = causal_lm(model)
    limit = batch_length_limit(inner)
    return ModelTraits(
        attention_implementation=str(inner.config._attn_implementation),
        absolute_positions=absolute_positions(inner),
        length_limit=int(limit) if math.isfinite(limit) else None,
        dtype=str(inner.dtype).removeprefix("torch."),
    )
