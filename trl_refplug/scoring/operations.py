"""
What a forward pass costs, in counted floating-point operations (a multiplication and an addition are two).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Operations:
    """
    Args:
        token (`float`): Per token: all matrix products with weights, without the LM head.
        pair (`float`): Per pair of a token and one it attends to: scores and weighted sum, all layers and heads.
        head (`float`): Per position projected through the LM head.
    """

    token: float
    pair: float
    head: float

    def span(self, start: int, stop: int) -> float:
        """Cost of the tokens at depths `start` to `stop` of a sequence, each attending to itself and all before."""
        return (stop - start) * self.token + (stop * (stop + 1) - start * (start + 1)) / 2 * self.pair


def count_operations(model: PreTrainedModel) -> Operations:
    """
    Operations of a causal LM, from its configuration and the shapes of its weights.

    Matrix products are counted, which is what planning and benchmarks need; norms, activations, rotary embeddings and
    look-ups in tables (of tokens, positions or, in Gemma 3n, tokens per layer) are left out. Of routed experts, those
    active for one token count; of a model that also sees or hears, what text goes through.
    """
    layers = layer_configs(model.config.get_text_config())
    config = layers[0]
    text = model.get_decoder()
    tables = [module for module in text.modules() if isinstance(module, nn.Embedding)]
    left_out = {id(module.weight) for module in (*tables, model.get_output_embeddings()) if module}
    experts: int = _first(config, "num_experts", "num_local_experts", "n_routed_experts") or 1
    active: int = _first(config, "num_experts_per_tok", "top_k_experts") or 1
    weights = 0.0
    for name, parameter in text.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the parameter itself is empty
        if id(parameter) in left_out or len(shape) < 2:
            continue
        size = float(math.prod(shape))
        weights += size * active / experts if ".experts." in name and experts > 1 else size
    hidden: int = _first(config, "hidden_size", "n_embd") or 1
    width = sum(_attention_width(layer, hidden) for layer in layers)
    return Operations(token=2 * weights, pair=4.0 * width, head=2.0 * config.vocab_size * hidden)


def layer_configs(config: Any) -> list[Any]:
    """What each layer is configured by: the same for all in most models, not so in Gemma 4."""
    layers: int = _first(config, "num_hidden_layers", "n_layer") or 1
    if not getattr(config, "is_heterogeneous", False):
        return [config] * layers
    return [config.per_layer_config[index] for index in range(layers)]


def _attention_width(config: Any, hidden: int) -> int:
    """Of the queries of a layer, all heads together."""
    heads: int = _first(config, "num_attention_heads", "n_head") or 1
    return heads * (_first(config, "head_dim") or hidden // heads)


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
