"""
The exact way to score: TRL's own reference call, on the batch as it is.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from trl_refplug.models.causal_lm import causal_lm, on_lm_head_device
from trl_refplug.provider import ReferenceBatch


def ensure_fused_head(model: nn.Module, temperature: float, cast_lm_head_to_fp32: bool) -> None:
    """
    Add TRL's fused LM head, which returns log-probs in place of logits, to the causal LM in `model`.

    If it has one already, as every model that a TRL trainer has prepared, nothing is changed.

    Args:
        model (`nn.Module`): The model, possibly wrapped.
        temperature (`float`): The head divides logits by it.
        cast_lm_head_to_fp32 (`bool`): The head computes in float32, as with TRL's flag of the same name.
    """
    from trl.trainer.utils import add_fused_lm_head

    inner = causal_lm(model)
    if not _has_fused_head(inner):
        add_fused_lm_head(inner, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32)


def _has_fused_head(inner: nn.Module) -> bool:
    forward: Any = inner.__dict__.get("forward")
    while forward is not None:  # accelerate may have wrapped the function once more
        function = getattr(forward, "__func__", forward)
        code = getattr(function, "__code__", None)
        if code is not None and "fused_lm_head" in inspect.getargs(code).args + list(code.co_varnames):
            return True
        forward = getattr(function, "__wrapped__", None) or getattr(function, "model_forward", None)
    return False


def exact_log_probs(model: nn.Module, batch: ReferenceBatch) -> Tensor:
    """
    Score a batch by the very call that TRL makes, with tensors of the same shapes.

    Args:
        model (`nn.Module`): A model with TRL's fused LM head, possibly wrapped.
        batch ([`ReferenceBatch`]): On the model's device.

    Returns:
        `Tensor`: float32 `[batch, seq - 1]`.
    """
    with torch.no_grad(), on_lm_head_device(causal_lm(model)):
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            **batch.extras,
            labels=batch.labels,
            fused_lm_head=True,
        )
    log_probs: Tensor = output.log_probs.float()  # with mixed precision, FSDP2 casts whatever a model returns
    virtual_tokens = log_probs.shape[1] - (batch.input_ids.shape[1] - 1)  # of a prompt-learning adapter
    return log_probs[:, virtual_tokens:]
