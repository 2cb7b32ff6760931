"""Tell from a configuration whether a row's log-probs depend on its place in the batch or the batch's length."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def batch_length_limit(inner: PreTrainedModel) -> float:
    """
    The largest number of columns of a batch in which a row's log-probs do not depend on the length of the other rows.

    Dynamic NTK and LongRoPE change the rotary embeddings of all rows as soon as a batch is longer than the length that
    the model was trained with. For every other model the limit is infinite.
    """
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
    """
    Whether the log-probabilities of a row may change when it is shifted, as padding on its left does.

    A model without rotary embeddings is taken to have absolute positions. Rotary embeddings only depend on distances.
    """
    config = inner.config.get_text_config()
    parameters = _rope_parameters(config)
    # Ministral and Beam scale each query by its position, in spite of their rotary embeddings
    scaled = getattr(config, "model_type", "") == "beam" or any("llama_4_scaling_beta" in some for some in parameters)
    return scaled or not parameters


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The parameters of the rotary embeddings: one dictionary for all layers, or one per layer type, or none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters] * ("rope_type" in parameters or "rope_theta" in parameters)
