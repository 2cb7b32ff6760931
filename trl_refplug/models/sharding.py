"""
Read and write tensors of which every rank holds only a part: DTensors (FSDP2, tensor parallelism) and parameters under
DeepSpeed ZeRO-3. All functions also take ordinary tensors; their part is the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """
    The place of a rank's part in the whole tensor.

    Args:
        shape (`tuple[int, ...]`): Shape of the whole tensor as it is cut into parts: its own shape, or one dimension
            with all elements under ZeRO-3, which cuts flat tensors.
        offset (`tuple[int, ...]`): Index in the whole tensor at which the part begins.
        size (`tuple[int, ...]`): Shape of the part.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    def slice_of(self, whole: Tensor) -> Tensor:
        """This part of `whole`, as a view where that is possible."""
        slices = tuple(slice(start, start + length) for start, length in zip(self.offset, self.size, strict=True))
        return whole.reshape(self.shape)[slices]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank may hold only a part of `tensor`."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "to_local")


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def local_part(tensor: Any) -> Tensor:
    """
    This rank's part of a tensor, without communication. It shares the tensor's memory, so that writing to it changes
    the tensor. Call this under `no_grad`.
    """
    if hasattr(tensor, "ds_id"):
        flat: Tensor = tensor.ds_tensor.data
        return flat[: part_of(tensor).size[0]]  # the last rank's partition is padded
    if hasattr(tensor, "to_local"):
        part: Tensor = tensor.to_local()
        return part
    whole: Tensor = tensor.data
    return whole


def part_of(tensor: Any) -> Part:
    """The place of [`local_part`] in the whole tensor."""
    shape = full_shape(tensor)
    if hasattr(tensor, "ds_id"):
        rank = torch.distributed.get_rank(tensor.ds_process_group)
        length, total = tensor.ds_tensor.numel(), prod(shape)
        start = min(rank * length, total)
        return Part((total,), (start,), (min(length, total - start),))
    if hasattr(tensor, "to_local"):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        size, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
        return Part(shape, tuple(offset), tuple(size))
    return Part(shape, (0,) * len(shape), shape)


def discard_gathered(tensor: Any) -> None:
    """
    Call this after writing to [`local_part`]: ZeRO-3 may still have the whole tensor in memory as it was before, and
    would use that.
    """
    if hasattr(tensor, "ds_id") and tensor.ds_status.name == "AVAILABLE":
        tensor.partition(has_been_updated=False)


def write_part(tensor: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of `whole`, which every rank has, into `tensor`."""
    local_part(tensor).copy_(part_of(tensor).slice_of(whole))
    discard_gathered(tensor)


@contextmanager
def gathered(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gather the whole of each tensor, for reading. If they are sharded, all ranks have to call this together."""
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if partitioned:
        import deepspeed

        with deepspeed.zero.GatheredParameters(partitioned):
            yield [tensor.data for tensor in tensors]
        return
    yield [_whole(tensor) for tensor in tensors]


def reshard(model: nn.Module) -> None:
    """
    Make FSDP2 shard every parameter again.

    After a forward pass without a backward pass, FSDP2 leaves the parameters of the root module gathered, and anything
    that is written to them then is lost.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def forward_is_collective(model: nn.Module) -> bool:
    """
    Whether a forward pass of `model` is a collective operation, so that all ranks have to make the same number of
    them.

    It is where weights are sharded (FSDP, ZeRO-3, tensor parallelism) and under DDP, which synchronizes buffers.
    """
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        return torch.distributed.get_world_size() > 1
    return any(is_sharded(p) for p in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()
