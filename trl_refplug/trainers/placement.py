"""Placing a reference that TRL would not have loaded itself: beside a PEFT policy, on another device, or nested."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from trl_refplug.errors import ConfigurationError


def place(module: Any, trainer: Any, *, temperature: float, device: str | None) -> nn.Module:
    """
    Do to `module` what TRL does to a reference of its own: dropout, LM head, temperature, sharding, device.

    Args:
        module (`nn.Module`): A transformers model or a `PeftModel`, as it was loaded.
        trainer: The trainer, constructed.
        temperature (`float`): What logits are divided by.
        device (`str` or `None`): Where it lives; `None` for wherever the trainer puts models.
    """
    args = trainer.args
    if device is not None:
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ConfigurationError(
                f"A reference on its own device ({device!r}) cannot be combined with DeepSpeed or FSDP, which place "
                "it themselves. Remove the option 'device'."
            )
        module = _moved(module, torch.empty(0, device=device).device)
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    if args.disable_dropout:
        disable_dropout_in_model(module)
    cast_lm_head = getattr(args, "cast_lm_head_to_fp32", False)
    if cast_lm_head:
        _cast_lm_head(base)
    add_fused_lm_head(base, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head)
    if device is not None:
        placed = trainer.accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
    elif trainer.is_deepspeed_enabled:
        placed = prepare_deepspeed(module, trainer.accelerator)
    elif trainer.is_fsdp_enabled:
        placed = prepare_fsdp(module, trainer.accelerator)
    else:
        placed = trainer.accelerator.prepare_model(module, evaluation_mode=True)
    placed.eval()  # not chained: a DeepSpeed engine's eval() returns None
    result: nn.Module = placed
    return result


def _moved(module: Any, device: torch.device) -> nn.Module:
    """All of `module` on one device, with nothing left of having been spread over several."""
    for part in module.modules():
        if "_hf_hook" in part.__dict__:  # a wrapper of PEFT would answer for what it wraps
            remove_hook_from_module(part)
        part.__dict__.pop("hf_device_map", None)  # accelerate refuses quantised models that it says are elsewhere
    if any(tensor.device != device for tensor in (*module.parameters(), *module.buffers())):
        module = module.to(device)
    return module  # type: ignore[no-any-return]


def _cast_lm_head(model: Any) -> None:
    """`cast_lm_head_to_fp32`, as GRPO applies it to its own reference: the tied embedding keeps its output dtype."""
    dtype = model.lm_head.weight.dtype
    model.lm_head = model.lm_head.float()
    if model.config.tie_word_embeddings and dtype != torch.float32:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.to(dtype))
