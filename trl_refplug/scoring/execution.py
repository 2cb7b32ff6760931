"""
Run a [`Pack`] through a model.

The model is called through its outermost `forward`, so that everything that wraps it (FSDP, autocast, PEFT) takes
effect. The backbone, which is the model without its LM head, has a hook that takes its hidden states: it projects the
scored positions through the LM head itself, and leaves no positions for the model's own head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trl_refplug.models.causal_lm import causal_lm, on_lm_head_device
from trl_refplug.models.tolerances import rounding_dtype
from trl_refplug.rows import IGNORED
from trl_refplug.scoring.attention import CannotPackError, tree_attention
from trl_refplug.scoring.head import Head
from trl_refplug.scoring.layout import Pack


@dataclass(frozen=True)
class PackOutput:
    """
    What a forward pass over a pack gives.

    Args:
        log_probs (`Tensor`): float32 `[scored]` (float64 from a float64 model), one value per target of the pack.
        dtype (`torch.dtype`): The dtype whose rounding errors the values have: the autocast dtype, or else that of the
            backbone's output, or float16 where it computes in TF32.
    """

    log_probs: Tensor
    dtype: torch.dtype


def forward_pack(model: nn.Module, pack: Pack, head: Head | None) -> PackOutput:
    """
    Score a pack in one forward pass of `model`, without gradients.

    Args:
        model (`nn.Module`): The model, possibly wrapped.
        pack ([`Pack`]): What to score.
        head ([`Head`] or `None`): Projects the scored positions. With `None` TRL's fused LM head does it, as in the
            exact call. Weights that are sharded over ranks are then gathered as many times and in the same order as in
            the exact call, which other ranks may be making at the same time.

    Raises:
        CannotPackError: The model turned out not to attend along the tree.
    """
    inner = causal_lm(model)
    device = inner.get_input_embeddings().weight.device
    scored: list[Tensor] = []  # one entry per run of the backbone: log-probs, or hidden states for TRL's head
    dtype = torch.float32

    def project(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal dtype
        hidden = output.last_hidden_state
        dtype = _computed_in(hidden)
        sources = torch.from_numpy(pack.sources).to(hidden.device)
        if head is None:
            scored.append(hidden[:, torch.cat([sources, sources[:1]])])  # TRL drops the last
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
    with torch.no_grad(), on_lm_head_device(inner), tree_attention(inner, pack) as tree, hooked:
        output = model(**tensors, **options)
    if len(scored) != 1:
        raise CannotPackError(f"a backbone that ran {len(scored)} times in one forward pass")
    layers = inner.config.get_text_config().num_hidden_layers
    if tree.calls != layers:
        raise CannotPackError(
            f"layers that do not attend through transformers' attention interface ({layers - tree.calls} of {layers}: "
            "recurrent, ALiBi or hand-written attention)"
        )
    return PackOutput(scored[0] if head is not None else output.log_probs[0].float(), dtype)


def _computed_in(hidden: Tensor) -> torch.dtype:
    """The dtype whose rounding errors the hidden states have."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return rounding_dtype(dtype, device)


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
