"""Find the causal language model inside its wrappers, and run Triton kernels on the right device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from trl_refplug.errors import ConfigurationError


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """
    The transformers model with an LM head inside `model`, which may be wrapped (PEFT, DDP, FSDP, DeepSpeed, ...).

    Raises:
        ConfigurationError: There is no such model.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise ConfigurationError(
        f"Found a {type(model).__name__} without a transformers language model in it; expected a causal LM with an LM "
        "head, such as AutoModelForCausalLM loads."
    )


@contextmanager
def on_lm_head_device(model: PreTrainedModel) -> Iterator[None]:
    """
    Make the device of the LM head the current one while the context lasts.

    Triton launches its kernels on the current device, even if their arguments are on another one. TRL's fused LM head
    is such a kernel.
    """
    device = model.get_output_embeddings().weight.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield
