"""What a provider may know of the run: the [`ReferenceContext`] of a real trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trl_refplug.errors import RefPlugError
from trl_refplug.provider import PlannedRows, ReferenceBatch, ReferenceProvider


if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from trl_refplug.trainers.session import ReferenceSession


class TrainerContext:
    """One provider's view of the trainer. See [`~trl_refplug.ReferenceContext`] for what each attribute means."""

    def __init__(self, session: ReferenceSession) -> None:
        self._session = session
        self.pinned_policy: nn.Module | None = None
        self.reference_model: nn.Module | None = None

    @property
    def policy(self) -> nn.Module:
        if self.pinned_policy is not None:
            return self.pinned_policy
        policy: nn.Module = self._built("policy").model
        return policy

    @property
    def accelerator(self) -> Accelerator:
        accelerator: Accelerator = self._built("accelerator").accelerator
        return accelerator

    @property
    def processing_class(self) -> Any:
        return self._built("processing_class").processing_class

    @property
    def args(self) -> Any:
        return self._session.args

    @property
    def temperature(self) -> float:
        # DPO and KTO have none.
        return float(getattr(self._session.args, "temperature", 1.0)) if self._session.seam.online else 1.0

    @property
    def peft_config(self) -> Any:
        return self._session.peft_config

    @property
    def resuming(self) -> bool:
        return self._session.resuming

    @property
    def policy_moved(self) -> bool:
        return self._session.policy_moved

    def create(self, name: str, options: Mapping[str, Any] | None = None) -> ReferenceProvider:
        return self._session.create_nested(name, options, self.policy)

    def place(self, module: nn.Module, device: str | None = None) -> nn.Module:
        from trl_refplug.trainers.placement import place

        return place(module, self._built("devices"), temperature=self.temperature, device=device)

    def planned(self, split: str) -> Iterator[ReferenceBatch] | None:
        from trl_refplug.trainers.requested_batches import planned

        return planned(self._built("planned batches"), self._session.seam, split)

    def planned_rows(self, split: str) -> Iterator[PlannedRows] | None:
        from trl_refplug.trainers.planned_rows import planned_rows

        return planned_rows(self._built("planned rows"), self._session.seam, split)

    def _built(self, what: str) -> Any:
        trainer = self._session.trainer
        if self.pinned_policy is not None or trainer is None:
            raise RefPlugError(
                f"The context has no {what} in pin(): TRL's trainer is not built yet. Use it in setup() or later."
            )
        return trainer
