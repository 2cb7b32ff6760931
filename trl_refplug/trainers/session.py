"""The session of one trainer's reference: it is pinned, placed, checked, asked, saved and closed here."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from trl_refplug.arguments import ReferenceArguments
from trl_refplug.errors import ConfigurationError, SeamError
from trl_refplug.models.adapters import base_model_of, is_peft, peft_model_of
from trl_refplug.models.dropout import disable_functional_dropout, has_dropout
from trl_refplug.provider import ReferenceBatch, ReferenceProvider
from trl_refplug.runtime.random_state import rng_kept
from trl_refplug.runtime.ranks import all_ranks
from trl_refplug.trainers import policy as policies
from trl_refplug.trainers.checkpoint import compare_with_checkpoint
from trl_refplug.trainers.context import Run, TrainerContext
from trl_refplug.trainers.monitor import DriftMonitor
from trl_refplug.trainers.moving_callbacks import refuse_moving_callbacks
from trl_refplug.trainers.online import WholeGenerations
from trl_refplug.trainers.placement import place
from trl_refplug.trainers.prefetch import Prefetcher
from trl_refplug.trainers.rank_check import compare_ranks
from trl_refplug.trainers.reference_check import ReferenceCheck
from trl_refplug.trainers.reference_model import ReferenceModel
from trl_refplug.trainers.selection import check_capabilities
from trl_refplug.trainers.trl_patch import PatchPoint, loading_replaced, unsupported_trl


logger = logging.getLogger("trl_refplug")


class ReferenceSession:
    """
    Takes the reference of one trainer through its life, and owns its provider.

    Args:
        patch_point ([`PatchPoint`]): Where the trainer's class loads its reference.
        provider ([`ReferenceProvider`]): The selected provider.
        name (`str`): What it is called in messages.
        args: The trainer's arguments.
        peft_config: The trainer's `peft_config` argument.
        ref_model (`nn.Module`, *optional*): The reference model that TRL itself gets, so that it places it.
        processing_class (*optional*), train_dataset (*optional*): The trainer's arguments of these names.
    """

    def __init__(
        self,
        patch_point: PatchPoint,
        provider: ReferenceProvider,
        name: str,
        args: Any,
        peft_config: Any,
        ref_model: nn.Module | None,
        processing_class: Any,
        train_dataset: Any,
    ) -> None:
        self.provider = provider
        self.name = name
        self.run = Run(patch_point, args, peft_config)
        self.flags = ReferenceArguments.of(args)
        self.check = ReferenceCheck(self.flags.ref_check, self.run)
        self.reference_model: ReferenceModel | None = None
        self.prefetcher: Prefetcher | None = None
        self.generations: WholeGenerations | None = None
        self.monitor: DriftMonitor | None = None
        self.asked_by_trainer = patch_point.needs_reference(args)  # else by the monitor alone
        self._ref_model = ref_model
        self._processing_class = processing_class
        self._train_dataset = train_dataset
        self._record: Any = None  # the answers to the probe in the checkpoint that training goes on from
        self._began = False
        self._calls_before: int | None = None
        self._context = TrainerContext(self.run, self._pin_nested)
        self._nested: list[tuple[ReferenceProvider, TrainerContext]] = []
        self._pinned = False
        check_capabilities(provider, name, temperature=self.run.temperature)
        if provider.capabilities.before_training_only:
            raise ConfigurationError(
                f"Reference provider {name!r} can be asked before training only, so it cannot be the reference of a "
                "run. Use it as the source of a stored reference."
            )

    @property
    def gives_trl_its_model(self) -> bool:
        """Whether TRL itself gets the reference model that was passed to the trainer, so that it places it."""
        return self._ref_model is not None

    # Before TRL touches anything

    def pin(self, policy: nn.Module) -> None:
        """Fix the reference, while `policy` is exactly as it was passed in."""
        with rng_kept():
            self.check.choose_rows(policy, self._processing_class, self._train_dataset)
            self._pin(self.provider, self._context, policy)
        self._pinned = True
        self._train_dataset = None

    def _pin_nested(self, provider: ReferenceProvider, name: str, policy: nn.Module, may_load_late: bool) -> None:
        """Pin a provider that another one is made of."""
        context = TrainerContext(self.run, self._pin_nested, may_load_late)
        self._nested.append((provider, context))  # before anything can fail, so that it is closed with the others
        check_capabilities(provider, name, temperature=self.run.temperature)
        self._pin(provider, context, policy)

    def _pin(self, provider: ReferenceProvider, context: TrainerContext, policy: nn.Module) -> None:
        context.pinned_policy = policy
        context.probe_rows = self.check.rows
        try:
            context.reference_model = _checked_model(provider, provider.pin(context))
            self.check.ask_declared(provider, context)
        finally:
            context.pinned_policy = None
        if context.reference_model is policy:
            raise ConfigurationError(
                f"{type(provider).__name__}.pin() returned the policy itself, which is about to be trained. Return a "
                "copy of it (`copy.deepcopy(context.policy)`), or None to have no model placed."
            )

    # While TRL constructs

    def loading_replaced(self, trainer: Any) -> AbstractContextManager[None]:
        """While the context lasts, TRL gets our reference where it would load its own."""

        def expected() -> int:
            # TRL loads a reference under the same condition.
            loads = self._ref_model is None and not is_peft_model(trainer.model)
            return int(loads and self.asked_by_trainer)

        return loading_replaced(
            self.run.patch_point,
            trainer,
            policy_loaded=self.pin,
            reference=self._reference_for_trl,
            expected=expected,
        )

    def _reference_for_trl(self) -> nn.Module | None:
        if not self._pinned:
            raise unsupported_trl("TRL asked for its reference before it loaded the policy")
        # We place a reference ourselves, later, if it has a device of its own or is a PEFT model.
        placed_by_us = self.provider.device is not None or is_peft(self._context.reference_model)
        return None if placed_by_us else self._context.reference_model

    # When TRL has constructed

    def start(self, trainer: Any, adapters_before: frozenset[str]) -> ReferenceModel:
        """Set the provider up, and return the module that goes into `trainer.ref_model`."""
        self.run._trainer = weakref.ref(trainer)
        self.run.args = trainer.args
        if not self._pinned:
            raise unsupported_trl("TRL constructed its trainer without loading the policy through the expected name")
        with rng_kept():
            for provider, context in reversed(self._nested):  # those that others are made of come first
                self._set_up(provider, context, trainer)
            self._set_up(self.provider, self._context, trainer)
        policies.remove_unused_reference_adapter(trainer.model, adapters_before, self.providers)
        if self.asked_by_trainer:
            self._match_dropout(trainer)
        compare_ranks(trainer.accelerator, self.provider, self.name)
        weakref.finalize(trainer, _close, self.providers)
        # Once more, because setup may have changed the capabilities.
        check_capabilities(self.provider, self.name, temperature=self.run.temperature)
        # All ranks must decide alike, because reading a loader can be a collective operation. But their providers may
        # differ: the device of the reference can be that of the policy on one rank only.
        overlap = all_ranks(self.provider.capabilities.overlap)
        if overlap and self.flags.ref_prefetch and not self.run.patch_point.online:
            self.prefetcher = Prefetcher(self.provider, self.flags.ref_prefetch)
        self.reference_model = ReferenceModel(
            self.provider,
            self._first_call,
            self.prefetcher,
            self._output_dtype(trainer.accelerator),
            policies.output_device(trainer.model),
        )
        if self.flags.ref_monitor_steps:
            self.monitor = DriftMonitor(self.reference_model, self.flags.ref_monitor_steps)
        if self.run.patch_point.online:
            self.generations = WholeGenerations(self.reference_model, overlap=overlap and self.flags.ref_prefetch > 0)
        return self.reference_model

    def _set_up(self, provider: ReferenceProvider, context: TrainerContext, trainer: Any) -> None:
        pinned = context.reference_model
        # TRL has placed the model that was passed to it, or that it got from us where it would load its own.
        placed = trainer.ref_model if provider is self.provider or pinned is self._ref_model else None
        if placed is None and pinned is not None:
            placed = place(pinned, trainer, temperature=self.run.temperature, device=provider.device)
        context.reference_model = placed
        provider.setup(context)
        self.check.built(provider, context)
        context.reference_model = None  # from here on only the provider holds it, and releases it in close()

    def _match_dropout(self, trainer: Any) -> None:
        if trainer.args.disable_dropout:
            disable_functional_dropout(trainer.model)
        elif has_dropout(trainer.model) and self.provider.capabilities.local_model:
            logger.warning(
                "The policy has dropout and `disable_dropout=False`: the reference is scored without dropout (TRL's "
                "own adapter reference would draw random numbers), the policy with it, so their log-ratio is noisy "
                "from the first step on. Set `disable_dropout=True` to compare like with like."
            )

    @staticmethod
    def _output_dtype(accelerator: Any) -> torch.dtype:
        dtype = policies.output_dtype(accelerator)
        if dtype != torch.float32:
            logger.warning(
                "FSDP2's mixed precision rounds what the policy answers to %s, log-probs as well, in TRL's own "
                "trainers as in these: a sum of 100 nats is then off by up to 0.25. The reference is rounded alike. "
                "To train on float32 log-probs, shard with FSDP1 or DeepSpeed, or set `output_dtype` of accelerate's "
                "`mixed_precision_policy` to torch.float32.",
                dtype,
            )
        return dtype

    @property
    def providers(self) -> list[ReferenceProvider]:
        """The selected provider, and those that it is made of."""
        return [self.provider, *(provider for provider, _ in self._nested)]

    def close(self) -> None:
        """
        Close all providers, the selected one first. If one of them raises an error, the others are closed all the
        same.
        """
        _close(self.providers)

    # While training

    @contextmanager
    def training(self, checkpoint: str | None) -> Iterator[None]:
        """
        Surround one call of `train()`. If training goes on from `checkpoint`, the reference has to be the one that the
        checkpoint was trained with.
        """
        trainer = self.run.trainer
        refuse_moving_callbacks(trainer.callback_handler.callbacks, trainer.ref_model, trainer.args)
        before = self.run.resumed, self.run.policy_moved
        self._began = False
        try:
            if checkpoint:
                self._record = compare_with_checkpoint(checkpoint, self.provider)
                self.run.resumed = self.run.policy_moved = True
            yield
        except BaseException:
            if not self._began:  # the policy has not changed, and still has to be checked when training does begin
                self.run.resumed, self.run.policy_moved = before
            raise
        finally:
            if self.prefetcher is not None:
                self.prefetcher.cancel()

    def training_begins(self) -> None:
        """To be called as training begins: the policy is placed, and the checkpoint is loaded if there is one."""
        assert self.reference_model is not None
        self._began = True
        if self.monitor is not None:
            self.monitor.training_begins()
        if not self.run.policy_moved:
            # It may have been checked in an evaluation, and the policy may have been changed since.
            self.reference_model.checked = False
        with rng_kept():
            for provider in self.providers:
                provider.on_train_begin()
            self.check.training_begins(self.providers)
            if self._record is not None:
                self.check.compare_with_record(self.providers, self._record)
                self._record = None

    def step_begins(self) -> None:
        """To be called as an optimizer step begins."""
        if self._calls_before is None and self.reference_model is not None:
            self._calls_before = self.reference_model.calls

    def rewound(self, checkpoint: str) -> None:
        """
        To be called when the policy was set back to `checkpoint`, the best one. A reference that follows the policy
        has to go back with it.
        """
        if self.provider.capabilities.moving:
            compare_with_checkpoint(checkpoint, self.provider)

    def step_ended(self, step: int) -> None:
        """
        To be called when an optimizer step is over. Raises an error if the trainer has not asked for its reference
        since the first step began.
        """
        self.run.policy_moved = True
        assert self.reference_model is not None
        if self.asked_by_trainer:
            self._check_that_it_was_asked(self.reference_model, step)
        if self.provider.capabilities.moving:
            self.provider.on_step_end(step)

    def _check_that_it_was_asked(self, reference: ReferenceModel, step: int) -> None:
        if self.run.trainer.ref_model is not reference:
            raise SeamError(
                f"By the end of step {step} `trainer.ref_model` had been replaced by a "
                f"{type(self.run.trainer.ref_model).__name__}, so training went on against another reference than the "
                "one that was declared. Declare it instead: `ref_model=`, or option 'model' of a provider."
            )
        if reference.calls == self._calls_before:
            raise SeamError(
                f"Step {step} ended and the trainer never asked for its reference. It was trained without one: "
                f"{type(self.run.trainer).__name__} overrides the loss, or ref_model was replaced after construction."
            )

    def checkpoint_begins(self, step: int) -> None:
        """To be called before a checkpoint is written: it must not have been trained with another reference."""
        with rng_kept():
            self.check.still_holds(self.providers, f"at the checkpoint of step {step}")

    def training_ended(self, step: int) -> None:
        """To be called when training is over, as planned or early."""
        if self.prefetcher is not None:
            self.prefetcher.cancel()  # the probe must not wait for answers that nobody needs any more
        for provider in self.providers:
            provider.on_train_end()
        with rng_kept():
            self.check.still_holds(self.providers, f"at the end of training, after step {step}")

    def _first_call(self, batch: ReferenceBatch, log_probs: Tensor) -> None:
        self.check.first_batch(self.provider, batch, log_probs)


def _checked_model(provider: ReferenceProvider, pinned: object) -> nn.Module | None:
    """
    Check that TRL can place what `pin` returned.

    Raises:
        ConfigurationError: It is no model of transformers or PEFT.
    """
    from transformers import PreTrainedModel

    if pinned is None:
        return None
    if isinstance(pinned, nn.Module) and isinstance(base_model_of(peft_model_of(pinned)), PreTrainedModel):
        return pinned
    raise ConfigurationError(
        f"{type(provider).__name__}.pin() returned a {type(pinned).__name__}; expected None, or one model of "
        "transformers or PEFT for TRL to place. A provider that is made of several models, or of a module of its own, "
        "returns None, keeps them, and places each in setup() with `context.place(model)`."
    )


def _close(providers: list[ReferenceProvider]) -> None:
    with ExitStack() as stack:
        for provider in reversed(providers):
            stack.callback(provider.close)
