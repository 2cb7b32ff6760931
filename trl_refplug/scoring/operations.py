"""
Count the floating-point operations of a forward pass. A multiplication and an addition are two operations.
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
    The operations that a model needs.

    Args:
        token (`float`): Operations per token: all matrix products with weights, except for the LM head.
        pair (`float`): Operations per pair of a token and a token that it attends to, over all layers and heads: the
            score, and the share of the weighted sum.
        head (`float`): Operations per position that is projected through the LM head.
    """

    token: float
    pair: float
    head: float

    def span(self, start: int, stop: int) -> float:
        """Operations of tokens `[start, stop)` of a sequence, each of which attends to itself and all before it."""
        return (stop - start) * self.token + (stop * (stop + 1) - start * (start + 1)) / 2 * self.pair


def count_operations(model: PreTrainedModel) -> Operations:
    """
    Count the operations of a causal LM from its configuration and the shapes of its weights.

    Only matrix products are counted, which is enough for planning and benchmarks. Norms, activations, rotary
    embeddings and look-ups in embedding tables (of tokens, of positions or, in Gemma 3n, of tokens per layer) are not.
    Of routed experts, only those that are active for a token count. Of a model that also takes images or sound, only
    the part that text goes through counts.
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
    """The configuration of each layer. In most models it is the same for all layers; in Gemma 4 it is not."""
    layers: int = _first(config, "num_hidden_layers", "n_layer") or 1
    if not getattr(config, "is_heterogeneous", False):
        return [config] * layers
    return [config.per_layer_config[index] for index in range(layers)]


def _attention_width(config: Any, hidden: int) -> int:
    """The width of a layer's queries, over all heads."""
    heads: int = _first(config, "num_attention_heads", "n_head") or 1
    return heads * (_first(config, "head_dim") or hidden // heads)


def _first(config: Any, *names: str) -> Any:
    """The value of the first of these entries that the configuration has; `None` if it has none."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
