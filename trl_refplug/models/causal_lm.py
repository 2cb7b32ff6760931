"""Finding the causal language model inside whatever wraps it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from trl_refplug.errors import ConfigurationError


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside `model`, whatever it is wrapped in (PEFT, DDP, FSDP, DeepSpeed, ...)."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise ConfigurationError(
        f"Found a {type(model).__name__} without a transformers language model in it; expected a causal LM with an LM "
        "head, such as AutoModelForCausalLM loads."
    )


@contextmanager
def on_its_device(model: PreTrainedModel) -> Iterator[None]:
    """Triton launches its kernels on the current device, wherever their arguments are: that of the LM head."""
    device = model.get_output_embeddings().weight.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield
