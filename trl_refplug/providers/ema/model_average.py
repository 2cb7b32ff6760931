"""A moving average of whole models (TR-DPO), as TRL's `sync_ref_model` makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from trl_refplug.models.identity import canonical_parameters
from trl_refplug.models.sharding import discard_gathered, local_part
from trl_refplug.providers.ema.whole_model import MovingModel


if TYPE_CHECKING:
    from torch import Tensor, nn


class ModelAverage(MovingModel):
    """
    `reference = alpha * policy + (1 - alpha) * reference`, in place, with TRL's own operations in TRL's order.

    If `dtype` is wider than the reference's, or `device` is another one, the average is kept in masters of that dtype
    on that device, and the reference holds the average rounded to its own dtype. In bfloat16 alone, a small `alpha`
    would move nothing.

    Args:
        reference (`nn.Module`): The reference, already placed and sharded as it will be. It is changed in place.
        policy (`Callable`): Returns the policy, which the trainer may still wrap before training starts.
        dtype (`torch.dtype`): The lowest precision in which the average may be kept.
        device (`torch.device` or `None`): The device of the masters; `None` for the reference's.
    """

    def __init__(
        self,
        reference: nn.Module,
        policy: Callable[[], nn.Module],
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(reference, policy)
        self._masters: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, tensor in canonical_parameters(reference).items():
                part = local_part(tensor)
                wide = torch.promote_types(dtype, part.dtype)
                if part.is_floating_point() and (part.dtype != wide or part.device != (device or part.device)):
                    self._masters[name] = part.to(device=device, dtype=wide, copy=True)

    @torch.no_grad()
    def move_to_policy(self, alpha: float) -> None:
        """Move the reference towards the policy. Nothing is communicated: every rank moves its own shards."""
        for name, parameter, reference, policy in self._local_pairs():
            average = self._precise(name, reference)
            if average.is_floating_point():
                average.mul_(1.0 - alpha).add_(policy.to(average.device), alpha=alpha)
            else:
                average.copy_(policy)
            if average is not reference:
                reference.copy_(average)
            discard_gathered(parameter)
        self._copy_buffers()

    def _precise(self, name: str, reference: Tensor) -> Tensor:
        return self._masters.get(name, reference)
