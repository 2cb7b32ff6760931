"""
Where sharing prefixes and packing rows would change the numbers, as far as a model's configuration tells.

What it does not tell is caught later: layers that attend in some other way are noticed while a pack runs, and before
a scorer trusts packed answers it compares some with the exact ones (`verification.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from trl_refplug.scoring.operations import layer_configs


_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def unsafe_model(model: nn.Module, inner: PreTrainedModel) -> str | None:
    """Why no input of this model may be packed, as a phrase that completes "because of"; `None` if none is known."""
    config = inner.config.get_text_config()
    if getattr(inner.config, "is_encoder_decoder", False):
        return "an encoder-decoder architecture"
    both_ways = getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")  # not of images
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
    """The longest padded row that may be packed, and why longer ones may not."""
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
    """Of the lengths that are set for some layer."""
    return min(filter(None, (getattr(layer, name, None) for layer in layer_configs(config))), default=None)


def batch_length_limit(inner: PreTrainedModel) -> float:
    """The longest batch in which a row's log-probs do not depend on how long the other rows are."""
    config = inner.config.get_text_config()
    return min(
        (
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
            for rope in _rope_parameters(config)
            if rope.get("rope_type") in ("dynamic", "longrope")
        ),
        default=float("inf"),
    )


def absolute_positions(inner: PreTrainedModel) -> bool:
    """Whether shifting a row, as padding on its left does, may change its log-probabilities."""
    config = inner.config.get_text_config()
    parameters = _rope_parameters(config)
    # Ministral and Beam scale queries by where they are
    scaled = getattr(config, "model_type", "") == "beam" or any("llama_4_scaling_beta" in some for some in parameters)
    return scaled or not parameters


def in_lockstep(model: nn.Module) -> bool:
    """
    Whether a forward pass is a collective operation, so that every rank has to make as many of them: sharded weights
    (FSDP, ZeRO-3, tensor parallel) and DDP, which synchronises buffers.
    """
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        return torch.distributed.get_world_size() > 1
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings' parameters: one dictionary, or one a layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters] * ("rope_type" in parameters or "rope_theta" in parameters)
