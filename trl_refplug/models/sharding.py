"""
Tensors of which every rank holds a part: DTensors (FSDP2, tensor parallelism) and DeepSpeed ZeRO-3 parameters.

Everything here also takes ordinary tensors, whose part is the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """
    Where a rank's part sits in the whole tensor.

    Args:
        shape (`tuple[int, ...]`): Shape of the whole in the layout that is cut: its own, or flat under ZeRO-3.
        offset (`tuple[int, ...]`): Where the part begins.
        size (`tuple[int, ...]`): Shape of the part.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """The part of `whole`, a view."""
        slices = tuple(slice(start, start + length) for start, length in zip(self.offset, self.size, strict=True))
        return whole.reshape(self.shape)[slices]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank may hold only a part of `tensor`."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "to_local")


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def local(tensor: Any) -> Tensor:
    """This rank's part, sharing its memory. No communication. Call it under `no_grad`."""
    if hasattr(tensor, "ds_id"):
        flat: Tensor = tensor.ds_tensor.data
        return flat[: part_of(tensor).size[0]]  # the last rank's partition is padded
    if hasattr(tensor, "to_local"):
        part: Tensor = tensor.to_local()
        return part
    whole: Tensor = tensor.data
    return whole


def part_of(tensor: Any) -> Part:
    """Where [`local`] sits in the whole."""
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


def refresh(tensor: Any) -> None:
    """After [`local`] was written to: drop what ZeRO-3 may have gathered of the tensor before."""
    if hasattr(tensor, "ds_id") and tensor.ds_status.name == "AVAILABLE":
        tensor.partition(has_been_updated=False)


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Write this rank's part of `whole`, which every rank has, into `tensor`."""
    local(tensor).copy_(part_of(tensor).of(whole))
    refresh(tensor)


@contextmanager
def gathered(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The whole of each tensor, to read. A collective if they are sharded."""
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if partitioned:
        import deepspeed

        with deepspeed.zero.GatheredParameters(partitioned):
            yield [tensor.data for tensor in tensors]
        return
    yield [_whole(tensor) for tensor in tensors]


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """
    The parameters by the name they have in the model itself, tied ones once, sharded wherever FSDP2 shards them.
    """
    from trl_refplug.models.identity import strip_wrappers

    reshard(model)
    return {strip_wrappers(name): parameter for name, parameter in model.named_parameters()}


def reshard(model: nn.Module) -> None:
    """
    Have FSDP2 put every parameter back into shards. A root module keeps its own gathered after a forward that no
    backward follows, and what is written to them then is lost.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def in_lockstep(model: nn.Module) -> bool:
    """
    Whether a forward pass is a collective operation, so that every rank has to make as many of them: sharded weights
    (FSDP, ZeRO-3, tensor parallel) and DDP, which synchronises buffers.
    """
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        return torch.distributed.get_world_size() > 1
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )
