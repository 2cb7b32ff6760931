"""
Tell from a model's configuration where packed answers would not be the exact ones.

What a configuration does not tell is caught later: layers that attend in some other way are noticed while a pack runs,
and before a scorer trusts packed answers, it compares some of them with exact ones (`verification.py`).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trl_refplug.models.positions import batch_length_limit
from trl_refplug.scoring.operations import layer_configs


_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def reason_not_to_pack(model: nn.Module, inner: PreTrainedModel) -> str | None:
    """
    Why no rows may be packed for this model.

    Args:
        model (`nn.Module`): The model, possibly wrapped.
        inner (`PreTrainedModel`): The causal LM in it.

    Returns:
        `str` or `None`: A phrase that completes "because of"; `None` if the configuration gives no reason.
    """
    config = inner.config.get_text_config()
    if getattr(inner.config, "is_encoder_decoder", False):
        return "an encoder-decoder architecture"
    # With "vision", only the tokens of images see each other both ways
    both_ways = getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")
    if getattr(config, "is_causal", True) is False or both_ways:
        return "attention that is configured not to be causal"
    if getattr(config, "alibi", False) or getattr(config, "model_type", "") in ("bloom", "mpt"):
        return "ALiBi position biases"
    if any(getattr(config, name, None) for name in ("expert_capacity", "capacity_factor", "moe_capacity_factor")):
        return "experts of limited capacity: which tokens they drop depends on the batch"
    if getattr(config, "attn_temperature_tuning", None):
        return "attention temperatures that depend on where in its input a token is"
    recurrent = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if recurrent:
        return f"recurrent or hybrid layers ({', '.join(sorted(recurrent))})"
    adapters = (getattr(module, "peft_config", None) for module in model.modules())
    peft_configs = [adapter for configs in adapters if isinstance(configs, dict) for adapter in configs.values()]
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in peft_configs):
        return "virtual tokens of a prompt-learning adapter"
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in peft_configs):
        return "an activated LoRA (aLoRA) adapter, which begins at a place of its own in each row"
    return None


def length_limit(inner: PreTrainedModel) -> tuple[float, str]:
    """The largest number of tokens, with padding, of rows that may be packed, and why longer ones may not."""
    config = inner.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    limits: list[tuple[float, str]] = [(float("inf"), "")]
    window = _shortest(config, "sliding_window")
    if window and getattr(config, "use_sliding_window", True) and (not kinds or "sliding_attention" in kinds):
        limits.append((window, f"rows longer than the sliding window of {window} tokens"))
    chunk = _shortest(config, "attention_chunk_size")
    if chunk and (not kinds or "chunked_attention" in kinds):
        limits.append((chunk, f"rows longer than the attention chunk of {chunk} tokens"))
    original = batch_length_limit(inner)
    limits.append((original, f"rotary embeddings that change when the batch is longer than {original} tokens"))
    return min(limits)


def _shortest(config: Any, name: str) -> int | None:
    """The smallest value that this entry of the configuration has in any layer; `None` if it is set in no layer."""
    return min(filter(None, (getattr(layer, name, None) for layer in layer_configs(config))), default=None)
