"""
Agree with the other ranks on a value.

Every function here is a collective operation: all ranks have to call it, or those that do wait forever. In a process
that is not part of a distributed launch, the answer is its own value.
"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from torch import Tensor, distributed


def min_over_ranks(number: int) -> int:
    """The smallest of all ranks' numbers."""
    return int(min(_gather_from_ranks(number)))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """
    The sum of all ranks' tensors, on the CPU. They are moved to the accelerator for it, as NCCL cannot add tensors on
    the CPU. This only works in a distributed launch.
    """
    moved = tensor.to(PartialState().device)
    distributed.all_reduce(moved)
    return moved.cpu()


def any_rank(holds: bool) -> bool:
    """Whether a condition holds on at least one rank."""
    return any(_gather_from_ranks(holds))


def all_ranks(holds: bool) -> bool:
    """Whether a condition holds on every rank."""
    return all(_gather_from_ranks(holds))


def _gather_from_ranks(value: Any) -> list[Any]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
