"""When a row's log-probs depend on where in a batch its tokens stand."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


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


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings' parameters: one dictionary, or one a layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters] * ("rope_type" in parameters or "rope_theta" in parameters)
