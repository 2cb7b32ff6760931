"""The `frozen` provider: a second copy of the policy as it was passed in, or another model that an option names."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from trl_refplug.errors import ConfigurationError
from trl_refplug.models.adapters import active_adapter
from trl_refplug.models.copies import snapshot
from trl_refplug.models.identity import digest_model
from trl_refplug.models.modes import stay_in_evaluation_mode
from trl_refplug.models.traits import traits_of
from trl_refplug.provider import (
    BulkScorer,
    ModelTraits,
    ReferenceBatch,
    ReferenceContext,
    ReferenceIdentity,
    ReferenceProvider,
)
from trl_refplug.providers.named_model import NamedModel
from trl_refplug.providers.options import FROZEN_CAPABILITIES, FrozenOptions
from trl_refplug.providers.trainer_scoring import trainer_scorer
from trl_refplug.runtime.threads import ScoringThread
from trl_refplug.scoring import Scorer


class FrozenProvider(ReferenceProvider):
    """
    Scores with a frozen copy in the trainer's process. It takes the memory of a second model, and one more forward
    pass per step.

    Without the option `model`, the copy is a snapshot of the policy, taken before anything touches it. So a policy
    that was merged or edited in memory is its own reference. (TRL would load the reference from the policy's path
    again.)

    If it has a device of its own (option `device`), it scores in a thread of its own while the policy works. If it is
    the source of a store, a model that an option names is loaded only when there is a row to score.

    Args:
        options ([`FrozenOptions`]): Which model it is, and on which device.
        model (`nn.Module`, *optional*): The model that was passed to the trainer as its reference.
    """

    Options = FrozenOptions
    capabilities = FROZEN_CAPABILITIES
    options: FrozenOptions

    def __init__(self, options: FrozenOptions | None = None, *, model: nn.Module | None = None) -> None:
        super().__init__(options)
        self._given = model
        self._named: NamedModel | None = None
        self._context: ReferenceContext | None = None
        self._module: nn.Module | None = None
        self._identity: ReferenceIdentity | None = None
        self._traits: ModelTraits | None = None
        self._scorer: Scorer | None = None
        self._bulk_scorer: Scorer | None = None
        self._thread: ScoringThread | None = None
        if self.options.model is None:
            for name in ("revision", "quantization_config"):
                if getattr(self.options, name) is not None:
                    raise ConfigurationError(
                        f"ref_provider='frozen': option {name!r} needs option 'model'. Without it the reference is "
                        "the policy as it was passed in, which is not loaded again."
                    )
        elif model is not None:
            raise ConfigurationError(
                f"A reference model was passed to the trainer (`ref_model=`) and option model={self.options.model!r} "
                "names another one. Keep one of the two."
            )

    @property
    def starts_as_policy(self) -> bool:
        # With another precision, its log-probs differ from the policy's on purpose.
        return self._given is None and self.options.model is None and self.options.dtype is None

    @property
    def device(self) -> str | None:
        return self.options.device

    @property
    def module(self) -> nn.Module | None:
        return self._module

    @property
    def scoring(self) -> Literal["exact", "packed"]:
        return self.options.scoring

    @property
    def model_traits(self) -> ModelTraits | None:
        return self._traits

    @property
    def at_hand(self) -> bool:
        return self._module is not None

    def pin(self, context: ReferenceContext) -> nn.Module | None:
        if self._given is not None:
            return self._pinned(self._given, "ref_model")
        if self.options.model is None:
            return self._pinned(snapshot(context.policy, self.options.dtype, self.options.device), "policy")
        self._named = NamedModel(self.options, context.policy, context.args)
        if not context.may_load_late:
            return self._pinned(self._named.load(), self.options.model)
        if remembered := self._named.remembered():
            self._identity, self._traits = remembered
            return None
        module = self._pinned(self._named.load(), self.options.model)
        self._traits = traits_of(module)
        self._named.remember(self.identity(), self._traits)
        return module

    def _pinned(self, module: nn.Module, name: str) -> nn.Module:
        self._identity = ReferenceIdentity(
            provider="frozen",
            digest=digest_model(module, adapter=active_adapter(module)),
            details={"model": name, "revision": self.options.revision, "dtype": str(getattr(module, "dtype", ""))},
        )
        return module

    def setup(self, context: ReferenceContext) -> None:
        self._context = context
        if context.reference_model is not None:
            self._use(context.reference_model, context)

    def _use(self, module: nn.Module, context: ReferenceContext) -> None:
        """Score with `module` from now on. It has been placed."""
        self._module = module
        stay_in_evaluation_mode(self._module)  # a model passed as `ref_model=` may still be in train mode
        self._scorer = trainer_scorer(self._module, context, self.options.scoring)
        self._bulk_scorer = trainer_scorer(self._module, context, "packed")
        if self._has_own_device(context):
            self._thread = ScoringThread()
            self.capabilities = replace(self.capabilities, overlap=True)

    def _load(self) -> Scorer:
        """The scorer. If the model was not needed before, it is loaded now."""
        if self._scorer is None:
            assert self._named is not None, "the session places what pin() returned"
            assert self._context is not None, "setup() comes first"
            module = self._named.load_as(self.identity())
            self._use(self._context.place(module, device=self.options.device), self._context)
        assert self._scorer is not None
        return self._scorer

    def _has_own_device(self, context: ReferenceContext) -> bool:
        if self.options.device is None:
            return False
        # Compare the devices of tensors: of several GPUs, "cuda" is the current one, and "cpu:0" is "cpu".
        own, policys = (torch.empty(0, device=device).device for device in (self.device, context.accelerator.device))
        return own != policys

    def identity(self) -> ReferenceIdentity:
        assert self._identity is not None, "identity() before pin()"
        return self._identity

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        scorer = self._load()
        if self._thread is not None:
            return self.submit(batch).result()  # only that thread may use the model
        if self.options.device is None:
            return scorer.log_probs(batch)
        return scorer.log_probs(batch.to(self.options.device)).to(batch.input_ids.device)

    def probe(self, batch: ReferenceBatch) -> Tensor | None:
        return self.log_probs(batch) if self.at_hand else None

    def submit(self, batch: ReferenceBatch) -> Future[Tensor]:
        scorer = self._load()
        assert self._thread is not None, "only with capabilities.overlap"
        # It is moved by the caller's thread. If it were moved later, that would have to wait for the work that
        # is put on the caller's CUDA stream in the meantime.
        moved = batch.to(self.options.device)
        return self._thread.submit(lambda: scorer.log_probs(moved).to(batch.input_ids.device))

    @contextmanager
    def bulk_scorer(self) -> Iterator[BulkScorer]:
        """A packed scorer of the reference."""
        self._load()
        assert self._bulk_scorer is not None
        yield self._bulk_scorer

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()
        # The trainer may be kept after training, but the copy must not be kept with it.
        self._module = None
        self._given = None
        self._scorer = self._bulk_scorer = None
        self._context = None
