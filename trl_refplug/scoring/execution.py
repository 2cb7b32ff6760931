"""
Running a [`Pack`] through a model.

The model is entered through its outermost `forward`, so that whatever wraps it (FSDP, autocast, PEFT) does its part.
A hook on the backbone takes the hidden states from there: it projects the scored positions through the LM head and
hands no position on to the model's own head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_refplug.errors import ConfigurationError
from trl_refplug.scoring.attention import UnsafeError, tree_attention
from trl_refplug.scoring.head import Head
from trl_refplug.scoring.layout import Pack
from trl_refplug.scoring.rows import IGNORED
from trl_refplug.tolerances import as_precise_as


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


def run_pack(model: nn.Module, pack: Pack, head: Head | None) -> Scored:
    """
    Score a pack: one forward pass of `model`, without gradient.

    Args:
        head ([`Head`] or `None`): What projects the scored positions. `None`: TRL's fused head, as in the exact call,
            so that weights which are spread over ranks are gathered as often, and in the same order.

    Raises:
        UnsafeError: The model turned out not to attend along the tree.
    """
    inner = causal_lm(model)
    device = inner.get_input_embeddings().weight.device
    scored: list[Tensor] = []  # of each time the backbone ran: log-probs, or with TRL's head hidden states
    dtype = torch.float32

    def project(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal dtype
        hidden = output.last_hidden_state
        dtype = _computed_in(hidden)
        sources = torch.from_numpy(pack.sources).to(hidden.device)
        if head is None:
            scored.append(hidden[:, torch.cat([sources, sources[:1]])])  # TRL drops the last, which predicts nothing
            output.last_hidden_state = scored[-1]
            return output
        targets = torch.from_numpy(pack.targets).to(hidden.device)
        lm_head: Any = inner.get_output_embeddings()
        bias = getattr(lm_head, "bias", None)
        scored.append(head.log_probs(hidden[0, sources], targets, lm_head.weight, bias))
        output.last_hidden_state = hidden[:, :0]
        return output

    inputs = {"input_ids": pack.tokens, "position_ids": pack.positions}
    if head is None:
        inputs["labels"] = np.concatenate([[IGNORED], pack.targets])
    tensors = {name: torch.from_numpy(values)[None].to(device) for name, values in inputs.items()}
    options = {"use_cache": False} if head is not None else {"fused_lm_head": True}
    hooked = _hooked(inner.base_model, project)
    with torch.no_grad(), on_its_device(inner), tree_attention(inner, pack) as tree, hooked:
        output = model(**tensors, **options)
    if len(scored) != 1:
        raise UnsafeError(f"a backbone that ran {len(scored)} times in one forward pass")
    layers = inner.config.get_text_config().num_hidden_layers
    if tree.calls != layers:
        raise UnsafeError(
            f"layers that do not attend through transformers' attention interface ({layers - tree.calls} of {layers}: "
            "recurrent, ALiBi or hand-written attention)"
        )
    return Scored(scored[0] if head is not None else output.log_probs[0].float(), dtype)


def _computed_in(hidden: Tensor) -> torch.dtype:
    """The dtype whose rounding errors the backbone's output has."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return as_precise_as(dtype, device)


@contextmanager
def on_its_device(model: PreTrainedModel) -> Iterator[None]:
    """Triton launches its kernels on the current device, wherever their arguments are: that of the LM head."""
    device = model.get_output_embeddings().weight.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


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
