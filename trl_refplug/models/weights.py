"""Noticing that weights were changed, without keeping a copy of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trl_refplug.models.sharding import local_part


_LANES = 4096  # a tensor is first summed in this many separate sums
_PIECE = 16 * _LANES
_SAMPLE = 64
_ROUNDING = 1e-5
"""Most by which a float32 weight may change, relative to the size of its tensor's weights, where an adapter was merged
and taken out again: some hundred roundings of 6e-8. Scaling a matrix by 1.01 changes its weights by 1e-2."""


@dataclass(frozen=True, eq=False)
class WeightMark:
    """
    What is remembered of one tensor, to notice later whether it was changed.

    Args:
        total (`int`): A checksum of all its bits.
        sample (`Tensor`): Some of its values: float64 `[sample]` on the CPU.
        dtype (`torch.dtype`): Its dtype. Float32 is precise enough to tell rounding from a real change.
        count (`int`): How many values it has: in a sharded tensor, those of this rank.
    """

    total: int
    sample: Tensor
    dtype: torch.dtype
    count: int


def mark_weights(weights: Iterable[tuple[str, Tensor]]) -> dict[str, WeightMark]:
    """
    Remember tensors by their names. A sharded tensor is remembered by this rank's part. Each is read once, in place.
    """
    with torch.no_grad():
        return {
            name if number == 0 else f"{name} (part {number})": _mark(part)
            for name, whole in weights
            for number, part in enumerate(plain_parts(local_part(whole)))
            if not part.is_meta
        }


def changed_weights(
    before: dict[str, WeightMark], weights: Iterable[tuple[str, Tensor]], *, placed: bool = False
) -> tuple[list[str], bool]:
    """
    Find the tensors that have changed since they were remembered.

    Args:
        placed (`bool`): Whether the model was placed since then, which may have cast its tensors or divided them
            among ranks. Such tensors cannot be compared, and do not count.

    Returns:
        `tuple[list[str], bool]`: Their names, and whether all of them changed only as much as rounding may change
        them.
    """
    after = mark_weights(weights)
    alike = {name for name, mark in before.items() if name in after and _comparable(mark, after[name])}
    changed = [
        name for name, mark in before.items() if (after[name].total != mark.total if name in alike else not placed)
    ]
    return changed, all(name in alike and _rounded(before[name], after[name]) for name in changed)


def _comparable(before: WeightMark, after: WeightMark) -> bool:
    return (before.dtype, before.count) == (after.dtype, after.count)


def _rounded(before: WeightMark, after: WeightMark) -> bool:
    """Whether a tensor changed as a whole, and by very little. A change that the sample does not show is local."""
    off = (after.sample - before.sample).abs().max()
    size = before.sample.square().mean().sqrt()
    return before.dtype == torch.float32 and bool(0 < off <= _ROUNDING * size)


def _mark(tensor: Tensor) -> WeightMark:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLE)
    values = flat[::step][:_SAMPLE]
    sample = values.double().cpu() if values.is_floating_point() else values.cpu().double()
    return WeightMark(_total(flat), sample, tensor.dtype, flat.numel())


def _total(flat: Tensor) -> int:
    """
    A checksum of all bits of a tensor. It depends on the order of the elements, with one exception: elements that are
    a multiple of `_LANES` apart can be exchanged without a change.
    """
    if not flat.is_contiguous():
        flat = flat.contiguous()
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    weights = torch.arange(1, 2 * _LANES, 2, dtype=torch.int64, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _PIECE):  # in pieces, because each becomes int64 while it is added up
        piece = bits[start : start + _PIECE]
        whole = len(piece) // _LANES * _LANES
        rest = piece[whole:].to(torch.int64)
        total = 31 * total + rest.mul(weights[: len(rest)]).sum()
        if whole:
            total = total + piece[:whole].view(-1, _LANES).sum(0, dtype=torch.int64).mul(weights).sum()
    return int(total)


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that a tensor is made of: itself, or the inner tensors of a quantized one (torchao)."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor.data


def shared_weights(one: nn.Module, other: nn.Module) -> list[str]:
    """Names of the parameters of `other` whose memory a parameter of `one` uses, too."""
    used = {_storage(part) for tensor in one.parameters() for part in plain_parts(local_part(tensor))} - {0}
    return [
        name
        for name, tensor in other.named_parameters()
        if any(_storage(part) in used for part in plain_parts(local_part(tensor)))
    ]


def _storage(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 if it has none, because it is on the meta device or empty."""
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
