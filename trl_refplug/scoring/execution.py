"""
Running a [`Pack`] through a model.

The model is entered through its outermost `forward`, so that whatever wraps it (FSDP, autocast, PEFT) does its part.
A hook on the backbone takes the hidden states from there: it projects the scored positions through the LM head and
hands no position on to the model's own head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_refplug.errors import ConfigurationError
from trl_refplug.scoring.attention import UnsafeError, tree_attention
from trl_refplug.scoring.head import Head
from trl_refplug.scoring.layout import Pack


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside `model`, whatever it is wrapped in (PEFT, DDP, FSDP, DeepSpeed, ...)."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise ConfigurationError(
        f"Found a {type(model).__name__} without a transformers language model in it; expected a causal LM with an LM "
        "head, such as AutoModelForCausalLM loads."
    )


@dataclass(frozen=True)
class Scored:
    """
    Args:
        log_probs (`Tensor`): float32 `[scored]` (float64 from a float64 model), one for each target of the pack.
        dtype (`torch.dtype`): What the backbone computed in: the autocast dtype, or that of its output.
    """

    log_probs: Tensor
    dtype: torch.dtype


def run_pack(model: nn.Module, pack: Pack, head: Head) -> Scored:
    """
    Score a pack: one forward pass of `model`, without gradient.

    Raises:
        UnsafeError: The model turned out not to attend along the tree.
    """
    inner = causal_lm(model)
    device = inner.get_input_embeddings().weight.device
    scored: list[Scored] = []

    def project(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output.last_hidden_state
        lm_head: Any = inner.get_output_embeddings()
        sources = torch.from_numpy(pack.sources).to(hidden.device)
        targets = torch.from_numpy(pack.targets).to(hidden.device)
        bias = getattr(lm_head, "bias", None)
        log_probs = head.log_probs(hidden[0, sources], targets, lm_head.weight, bias)
        scored.append(Scored(log_probs, _computed_in(hidden)))
        output.last_hidden_state = hidden[:, :0]
        return output

    with torch.no_grad(), tree_attention(inner, pack) as tree, _hooked(inner.base_model, project):
        model(
            input_ids=torch.from_numpy(pack.tokens)[None].to(device),
            position_ids=torch.from_numpy(pack.positions)[None].to(device),
            use_cache=False,
        )
    layers = inner.config.get_text_config().num_hidden_layers
    if tree.calls != layers:
        raise UnsafeError(
            f"layers that do not attend through transformers' attention interface ({layers - tree.calls} of {layers}: "
            "recurrent, ALiBi or hand-written attention)"
        )
    if len(scored) != 1:
        raise UnsafeError(f"a backbone that ran {len(scored)} times in one forward pass")
    return scored[0]


def _computed_in(hidden: Tensor) -> torch.dtype:
    """The dtype whose rounding errors the backbone's output has."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return torch.float16  # TF32 has the mantissa of float16
    return dtype


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch `model` to evaluation mode and back, module by module: a frozen part may have been in it before."""
    training = [module for module in model.modules() if module.training and not _is_repacked(module)]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def stay_in_evaluation_mode(model: nn.Module) -> None:
    """Put a model that is never trained in evaluation mode, where it scores as it would inside [`evaluation_mode`]."""
    for module in model.modules():
        module.training = _is_repacked(module)


def _is_repacked(module: nn.Module) -> bool:
    # On a CPU, bitsandbytes' layers rewrite their weights in place for another, less precise kernel when they run in
    # evaluation mode. They have no dropout to switch off.
    return type(module).__module__.startswith("bitsandbytes.")
