"""
Attention over the tree of a [`Pack`], registered with transformers as an attention implementation.

While [`tree_attention`] is active, the model's layers call [`_attend`] in place of their own implementation (sdpa,
eager, flash, ...).

- On CPU there is one attention call per node of the tree: the queries are the node's tokens and all tokens below it,
  the keys are the node's own. A token therefore gets one partial result from each of its ancestors and one from its
  own node, and these are merged by the log-sum-exp of their scores. No mask is built, and no work is done beyond what
  `operations.py` counts.
- On CUDA there is one call of compiled FlexAttention, which skips the blocks of queries and keys that do not see each
  other. These blocks follow from where the nodes end, so that no mask of all pairs is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from trl_refplug.scoring.layout import Node, Pack


NAME = "refplug_tree"

_IGNORED_OPTIONS = {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}
_IGNORED_OPTIONS |= {
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_to_keep",
    "position_embeddings",
}


class CannotPackError(Exception):
    """With this model or this batch, packed answers would not be the exact ones. The text completes "because of"."""


FLEX_DEVICES = {"cuda"}
"""The device types on which FlexAttention is the fastest."""

FLEX_BLOCK = 128
"""Number of queries, and of keys, in a block, which FlexAttention either skips or computes."""

SCORES = 2**22
"""Most attention scores, over all heads, held in memory at once where no fused kernel returns their log-sum-exp."""


class TreeAttention:
    """The tree of the pack that is being scored, and the number of layers that have attended along it so far."""

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self.calls = 0
        self._block_masks: dict[torch.device, BlockMask] = {}
        self._softcaps: dict[tuple[torch.device, float], Tensor] = {}

    def block_mask(self, device: torch.device) -> BlockMask:
        """The tree in the form that FlexAttention takes, built once per pack and device."""
        if device not in self._block_masks:
            self._block_masks[device] = _block_mask(self.pack, device)
        return self._block_masks[device]

    def softcap(self, device: torch.device, softcap: float) -> Tensor:
        """A soft cap as a tensor. It is made once, because a copy to the device waits for all pending work."""
        if (device, softcap) not in self._softcaps:
            self._softcaps[device, softcap] = torch.tensor(softcap, device=device)
        return self._softcaps[device, softcap]


def _block_mask(pack: Pack, device: torch.device) -> BlockMask:
    tokens = len(pack.tokens)
    ends = np.concatenate([np.full(node.stop - node.start, node.end) for node in pack.nodes])
    starts = np.arange(0, tokens, FLEX_BLOCK)  # the first token of each block
    first, last = starts[:, None], starts[:, None] + FLEX_BLOCK - 1  # the first and last query of each block
    before = starts < first  # a block of queries always sees a part of the same block of keys, and never all of it
    seen = before & (np.maximum.reduceat(ends, starts) > first) | (starts == first)
    whole = before & (np.minimum.reduceat(ends, starts) > last)

    def listed(blocks: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """For each block of queries, how many blocks of keys it has, and the indices of all blocks, these first."""
        count, order = torch.from_numpy(blocks.sum(1)), torch.from_numpy(np.argsort(~blocks, axis=1, kind="stable"))
        return count[None, None].to(device, torch.int32), order[None, None].to(device, torch.int32)

    key_ends = torch.from_numpy(ends).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < key_ends[key])

    return BlockMask.from_kv_blocks(
        *listed(seen & ~whole), *listed(whole), FLEX_BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )


_active: ContextVar[TreeAttention | None] = ContextVar("refplug_tree_attention", default=None)


@contextmanager
def tree_attention(model: PreTrainedModel, pack: Pack) -> Iterator[TreeAttention]:
    """Make all attention layers of `model` attend along the tree of `pack` while the context lasts."""
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    configs |= {id(config): config for config in (c.get_text_config() for c in list(configs.values()))}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    tree = TreeAttention(pack)
    token = _active.set(tree)
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield tree
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        _active.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """
    Attend along the active tree. This has the signature of transformers' attention implementations.

    Args:
        query (`Tensor`): `[1, heads, tokens, dim]`.
        key, value (`Tensor`): The same, possibly with fewer heads (grouped-query attention).

    Returns:
        `tuple[Tensor, None]`: `[1, tokens, heads, dim]`, and no attention weights.
    """
    tree = _active.get()
    if tree is None:
        raise RuntimeError(f"The attention implementation {NAME!r} only works inside trl-refplug's scorer.")
    tree.calls += 1
    _refuse_unknown(module, tree.pack, query, key, attention_mask, sliding_window, options)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings turn query and key into float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.device.type in FLEX_DEVICES and _fits_flex(query, value):
        cap = None if softcap is None else tree.softcap(query.device, softcap)
        output = _flex(query, key, value, tree.block_mask(query.device), scaling, cap)
    else:
        output = _by_node(tree.pack.nodes, query, key, value, scaling, softcap)
    return output.transpose(1, 2).contiguous(), None


def _by_node(
    nodes: Sequence[Node], query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    fused = query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]
    heads, tokens = query.shape[1:3]
    # Partial results are merged in float32, because in half precision the rounding at every ancestor would add up
    dtype = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(1, tokens, heads, value.shape[-1], dtype=dtype).transpose(1, 2)
    weight = query.new_empty(1, heads, tokens, dtype=dtype)
    covered = 0
    for node in nodes:
        below, own = slice(node.start, node.end), slice(node.start, node.stop)
        operands = query[:, :, below], key[:, :, own], value[:, :, own]
        part, part_weight = _fused(*operands, scaling) if fused else _explicit(*operands, scaling, softcap)
        if node.start >= covered:  # a root
            covered = node.end
            output[:, :, below], weight[:, :, below] = part, part_weight
            continue
        share = torch.sigmoid(part_weight - weight[:, :, below]).unsqueeze(-1)
        output[:, :, below].lerp_(part.to(dtype), share)
        weight[:, :, below] = torch.logaddexp(weight[:, :, below], part_weight)
    return output.to(query.dtype)


def _fused(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    # With more queries than keys, this kernel takes "causal" to mean that query i sees keys 0 to i. That is what a
    # node and the nodes below it need: the node's tokens see those before them, and later tokens see all of the node
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
        query, key, value, dropout_p=0.0, is_causal=True, scale=scaling
    )


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """
    The same as [`_fused`] by explicit matrix products. It takes only as many queries at a time as have at most
    [`SCORES`] scores.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries = max(1, SCORES // (key.shape[1] * key.shape[2]))
    parts = []
    for start in range(0, query.shape[2], queries):
        some, seen = query[:, :, start : start + queries], slice(0, start + queries)
        parts.append(_explicit_some(some, key[:, :, seen], value[:, :, seen], start, scaling, softcap))
    outputs, weights = zip(*parts, strict=True)
    return torch.cat(outputs, 2), torch.cat(weights, 2)


def _explicit_some(
    query: Tensor, key: Tensor, value: Tensor, first: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of consecutive queries, beginning with query `first`. Number i of them sees keys 0 to `first` + i."""
    scores = (query @ key.transpose(-1, -2) * scaling).to(torch.promote_types(query.dtype, torch.float32))
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(first + 1)
    scores.masked_fill_(unseen, -torch.inf)
    weight = torch.logsumexp(scores, -1)
    return scores.sub_(weight.unsqueeze(-1)).exp_().to(value.dtype) @ value, weight


def _fits_flex(query: Tensor, value: Tensor) -> bool:
    """Whether FlexAttention can do this: its kernels multiply tiles of at least 16 by 16, in at most float32."""
    return min(query.shape[-1], value.shape[-1]) >= 16 and query.dtype != torch.float64


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float, cap: Tensor | None) -> Tensor:
    output: Tensor = _compiled_flex_attention()(
        query,
        key,
        value,
        score_mod=None if cap is None else _soft_capped(cap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        # Below 128 queries FlexAttention would choose its decoding kernel, which does not support the numbers of
        # grouped heads and queries that most packs have
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return output


def _soft_capped(cap: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def modified(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return modified


@cache
def _compiled_flex_attention() -> Any:
    # Packs differ in length. Without `dynamic`, torch would compile again for every length until it reached its limit.
    # Even with it there is one variant per head size, dtype and device. Beyond the limit FlexAttention is not
    # compiled, and would hold the scores of all pairs in memory, so the limit is raised
    options: dict[str, Any] = {"recompile_limit": 64, "isolate_recompiles": True}  # torch 2.9 does not have these yet
    known = inspect.signature(torch.compile).parameters
    return torch.compile(flex_attention, dynamic=True, **{name: options[name] for name in options if name in known})


def _refuse_unknown(
    module: nn.Module,
    pack: Pack,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    options: dict[str, Any],
) -> None:
    if attention_mask is not None:
        raise CannotPackError("a mask of its own that the model adds to attention")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise CannotPackError("attention that is not causal")
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == len(pack.tokens):
        raise CannotPackError(
            "attention over other tokens than the input's (cross-attention, compressed or cached keys)"
        )
    if sliding_window is not None and pack.longest > sliding_window:
        raise CannotPackError(f"rows longer than the sliding window of {sliding_window} tokens")
    unknown = sorted(name for name, value in options.items() if value is not None and name not in _IGNORED_OPTIONS)
    if unknown:
        raise CannotPackError(f"the attention option {unknown[0]!r}, which has no equivalent for shared prefixes")


AttentionInterface.register(NAME, _attend)
