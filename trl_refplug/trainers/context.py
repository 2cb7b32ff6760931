"""What a provider gets to see of the run: the [`ReferenceContext`] of a real trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl_refplug.errors import RefPlugError
from trl_refplug.provider import ReferenceBatch, ReferenceProvider
from trl_refplug.trainers.placement import place
from trl_refplug.trainers.planned_rows import planned_rows
from trl_refplug.trainers.requested_batches import planned
from trl_refplug.trainers.selection import make_provider
from trl_refplug.trainers.trl_patch import PatchPoint


if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from numpy.typing import NDArray
    from torch import nn

    from trl_refplug.rows.planned import PlannedRows


@dataclass
class Run:
    """
    One run of a trainer. All providers that its reference is made of share it.

    Args:
        patch_point ([`PatchPoint`]): Where the trainer's class loads its reference.
        args: The trainer's arguments.
        peft_config: The trainer's `peft_config` argument.

    Attributes:
        resumed (`bool`): Whether training goes on from a checkpoint.
        policy_moved (`bool`): Whether the policy may be another than the one passed in.
    """

    patch_point: PatchPoint
    args: Any
    peft_config: Any
    resumed: bool = False
    policy_moved: bool = False
    _trainer: Callable[[], Any] = field(default=lambda: None, repr=False)

    @property
    def trainer(self) -> Any:
        """
        The trainer, once it is built; `None` before. It is a weak reference, because providers keep their context for
        as long as the trainer exists.
        """
        return self._trainer()

    @property
    def resuming(self) -> bool:
        """Whether training goes on from a checkpoint, or `args.resume_from_checkpoint` says that it will."""
        return self.resumed or bool(self.args.resume_from_checkpoint)

    @property
    def temperature(self) -> float:
        """What the trainer divides logits by: 1 for DPO and KTO, which have no temperature."""
        return float(self.args.temperature) if self.patch_point.online else 1.0


class TrainerContext:
    """
    One provider's view of the run. See [`~trl_refplug.ReferenceContext`] for what each attribute means.

    Args:
        run ([`Run`]): The run.
        pin_nested (`Callable`): Called to pin a provider that this one is made of. It takes the provider, its name for
            messages, the policy, and `may_load_late`.
        may_load_late (`bool`): Whether this provider may never be asked for a log-prob.
    """

    def __init__(
        self,
        run: Run,
        pin_nested: Callable[[ReferenceProvider, str, nn.Module, bool], None],
        may_load_late: bool = False,
    ) -> None:
        self._run = run
        self._pin_nested = pin_nested
        self.may_load_late = may_load_late
        self.probe_rows: NDArray[np.int64] | None = None
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
        return self._run.args

    @property
    def temperature(self) -> float:
        return self._run.temperature

    @property
    def online(self) -> bool:
        return self._run.patch_point.online

    @property
    def peft_config(self) -> Any:
        return self._run.peft_config

    @property
    def resuming(self) -> bool:
        return self._run.resuming

    @property
    def policy_moved(self) -> bool:
        return self._run.policy_moved

    def create(
        self, name: str, options: Mapping[str, Any] | None = None, *, may_load_late: bool = False
    ) -> ReferenceProvider:
        provider = make_provider(name, options)
        self._pin_nested(provider, name, self.policy, may_load_late)
        return provider

    def adopt(self, provider: ReferenceProvider, *, may_load_late: bool = False) -> ReferenceProvider:
        self._pin_nested(provider, type(provider).__name__, self.policy, may_load_late)
        return provider

    def place(self, module: nn.Module, device: str | None = None) -> nn.Module:
        return place(module, self._built("devices"), temperature=self.temperature, device=device)

    def planned(self, split: str) -> Iterator[ReferenceBatch] | None:
        return planned(self._built("planned batches"), self._run.patch_point, split)

    def planned_rows(self, split: str) -> Iterator[PlannedRows] | None:
        return planned_rows(self._built("planned rows"), self._run.patch_point, split)

    def _built(self, what: str) -> Any:
        trainer = self._run.trainer
        if self.pinned_policy is not None or trainer is None:
            raise RefPlugError(
                f"The context has no {what} in pin(): TRL's trainer is not built yet. Use it in setup() or later."
            )
        return trainer
