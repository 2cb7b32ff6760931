"""A bias-corrected moving average of whole models (BEMA, arXiv 2508.00180), as TRL's `BEMACallback` makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trl_refplug.models.identity import canonical_parameters
from trl_refplug.models.sharding import Part, discard_gathered, full_shape, local_part, part_of
from trl_refplug.providers.ema.tensor_files import TensorReader
from trl_refplug.providers.ema.whole_model import MovingModel


if TYPE_CHECKING:
    from torch import Tensor, nn

    from trl_refplug.providers.options import EmaOptions


_LAST_UPDATE = "bema.last_update"


@dataclass
class _Kept:
    """
    What is kept of one parameter: this rank's part of three tensors.

    Args:
        start (`Tensor`): The policy where the average starts, the paper's `theta_0`.
        ema (`Tensor`): The moving average of the policy.
        corrected (`Tensor`): The moving average plus the correction, in the reference's precision. The reference
            becomes this when it is its turn, which may be some steps later.
    """

    start: Tensor
    ema: Tensor
    corrected: Tensor

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the three tensors of the parameter `name`, each by the name under which it is saved."""
        return {
            f"bema.start/{name}": self.start,
            f"bema.ema/{name}": self.ema,
            f"bema.corrected/{name}": self.corrected,
        }


class BiasCorrectedAverage(MovingModel):
    """
    A reference that becomes the bias-corrected moving average of the policy every `ref_model_update_freq` steps. The
    average itself is brought up to date every `update_freq` steps, with TRL's own operations in TRL's order:

    ```
    ema       = (1 - beta) * ema + beta * policy        beta  = max((lag + multiplier * step) ** -ema_power, minimum)
    corrected = ema + alpha * (policy - start)          alpha = (lag + multiplier * step) ** -bias_power
    ```

    Nothing is communicated: every rank keeps and moves its own shards.

    Args:
        reference (`nn.Module`): The reference, already placed and sharded as it will be. It is changed in place.
        policy (`Callable`): Returns the policy, which the trainer may still wrap before training starts.
        options ([`EmaOptions`]): The options of `average="bema"`.
        dtype (`torch.dtype`): The lowest precision in which the average may be kept.
        device (`torch.device` or `None`): The device of the average; `None` for the reference's.
    """

    def __init__(
        self,
        reference: nn.Module,
        policy: Callable[[], nn.Module],
        options: EmaOptions,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(reference, policy)
        self._options = options
        self._dtype, self._device = dtype, device
        self._kept: dict[str, _Kept] = {}
        self._last_update = 0
        self._loaded = False

    @torch.no_grad()
    def training_begins(self) -> None:
        """Start the average at the policy as it is now, unless a checkpoint has said where the average is."""
        if self._loaded:
            self._loaded = False
            return
        self._kept.clear()
        self._last_update = 0
        for name, _, reference, policy in self._local_pairs():
            if policy.is_floating_point():
                self._kept[name] = self._new(reference, policy)

    def training_ends(self) -> None:
        """Forget that the best checkpoint was loaded: if `train()` is called again, it starts a new average."""
        self._loaded = False

    @torch.no_grad()
    def step_ended(self, step: int) -> bool:
        """
        Bring the average up to date, and the reference too, if it is their turn after this optimizer step.

        Returns:
            `bool`: Whether the reference became the average.
        """
        options = self._options
        since_start = step - options.update_after
        starts = since_start == 0
        updates = since_start > 0 and since_start % options.update_freq == 0
        since_first_move = step - options.ref_model_update_after
        moves = since_first_move >= 0 and since_first_move % options.ref_model_update_freq == 0
        if not (starts or updates or moves):
            return False
        for name, parameter, reference, policy in self._local_pairs():
            kept = self._kept.get(name)
            if kept is not None:
                current = policy.to(kept.ema.device)
                if starts:
                    kept.start.copy_(current)
                    kept.ema.copy_(current)
                elif updates:
                    self._update(kept, current, step)
            if moves:
                reference.copy_(policy if kept is None else kept.corrected)
                discard_gathered(parameter)
        if updates:
            self._last_update = step
        if moves:
            self._copy_buffers()
        return moves

    def counters(self) -> dict[str, float]:
        """Return the step after which the average was last brought up to date, 0 if it never was."""
        return {"average_step": float(self._last_update)}

    def _new(self, reference: Tensor, value: Tensor) -> _Kept:
        """Return an average that starts at `value`."""
        wide = torch.promote_types(self._dtype, reference.dtype)
        device = self._device or reference.device
        start = value.to(device=device, dtype=wide, copy=True)
        return _Kept(start, start.clone(), start.to(reference.dtype, copy=True))

    def _update(self, kept: _Kept, policy: Tensor, step: int) -> None:
        age = self._options.lag + self._options.multiplier * step
        beta = max(age**-self._options.ema_power, self._options.min_ema_multiplier)
        alpha = age**-self._options.bias_power
        kept.ema.mul_(1 - beta).add_(policy, alpha=beta)
        kept.corrected.copy_(kept.ema + alpha * (policy - kept.start))

    def _entries(self, writes: bool) -> Iterator[tuple[str, Tensor, Part, torch.dtype]]:
        yield from super()._entries(writes)
        for name, parameter in canonical_parameters(self._reference).items():
            if name in self._kept:
                for saved_as, tensor in self._kept[name].tensors(name).items():
                    yield saved_as, tensor, part_of(parameter), tensor.dtype
        if writes:
            last_update = torch.tensor(self._last_update)
            yield _LAST_UPDATE, last_update, part_of(last_update), last_update.dtype

    def _restore(self, reader: TensorReader) -> None:
        super()._restore(reader)
        self._kept.clear()
        for name, parameter in canonical_parameters(self._reference).items():
            if parameter.is_floating_point():
                reference = local_part(parameter)
                self._kept[name] = self._new(reference, reference)
                for saved_as, tensor in self._kept[name].tensors(name).items():
                    tensor.copy_(part_of(parameter).slice_of(reader.whole(saved_as, full_shape(parameter))))
        self._last_update = int(reader.whole(_LAST_UPDATE, ()))
        self._loaded = True
