"""What ranks tell each other where all have to do the same. All ranks have to ask."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from torch import Tensor, distributed


def least(number: int) -> int:
    """The smallest of all ranks' numbers."""
    return int(min(_of_all_ranks(number)))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, on the CPU, where NCCL reduces none."""
    moved = tensor.to(PartialState().device)
    distributed.all_reduce(moved)
    return moved.cpu()


def any_rank(holds: bool) -> bool:
    """Whether something holds on any rank."""
    return any(_of_all_ranks(holds))


def all_ranks(holds: bool) -> bool:
    """Whether something holds on every rank."""
    return all(_of_all_ranks(holds))


def _of_all_ranks(value: Any) -> list[Any]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
