"""The `adapter` provider: the PEFT policy itself, with its adapters disabled or with a frozen adapter active."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trl_refplug.errors import ConfigurationError, ImpureReferenceError, did_you_mean
from trl_refplug.models.adapter_purity import check_policy, rewritten_tensors
from trl_refplug.models.adapters import (
    add_reference_adapter,
    base_model_of,
    freeze_adapter,
    is_peft,
    peft_model_of,
    policy_adapter,
    reference_active,
    starts_as_identity,
)
from trl_refplug.models.identity import canonical_tensors, combine_digests, digest_tensors, tensor_dtypes
from trl_refplug.provider import ReferenceBatch, ReferenceContext, ReferenceIdentity, ReferenceProvider
from trl_refplug.providers.options import ADAPTER_CAPABILITIES, AdapterOptions
from trl_refplug.providers.trainer_scoring import trainer_scorer
from trl_refplug.scoring import Scorer


class AdapterProvider(ReferenceProvider):
    """
    Scores with the policy's own weights. It needs no second copy of the model, and one more forward pass per step.

    Policies whose base model would drift, or is not the reference that was declared, are refused in `setup`.
    """

    Options = AdapterOptions
    capabilities = ADAPTER_CAPABILITIES
    options: AdapterOptions

    def __init__(self, options: AdapterOptions | None = None) -> None:
        super().__init__(options)
        self._context: ReferenceContext | None = None
        self._identity: ReferenceIdentity | None = None
        self._base_tensors: dict[str, str] = {}
        self._starts_as_policy = False
        self._scored_policy: nn.Module | None = None
        if self.options.adapter is not None and self.options.start is not None:
            raise ConfigurationError(
                "ref_provider='adapter': options 'adapter' (a named adapter) and 'start' (the policy's own) exclude "
                "each other. Keep one."
            )

    @property
    def starts_as_policy(self) -> bool:
        return self._starts_as_policy

    @property
    def reference_adapter(self) -> str | None:
        """The name of the adapter that is the reference; `None` if it is the base model with adapters disabled."""
        return self._reference_adapter

    def pin(self, context: ReferenceContext) -> None:
        policy: Any = context.policy
        self._is_new = not is_peft(policy)
        if not self._is_new:
            check_policy(policy, "adapter")
        if self._is_new and context.peft_config is None:
            raise ConfigurationError(
                "ref_provider='adapter' needs a PEFT policy: pass `peft_config=` or a PeftModel, or use "
                "ref_provider='frozen' for full fine-tuning."
            )
        start = self.options.start or ("base" if self._is_new else "adapter")
        self._base_tensors, self._base_dtypes = digest_tensors(policy), tensor_dtypes(policy)
        pinned: str | None
        if self.options.adapter is not None:
            pinned = self._named_adapter(policy)
        else:
            pinned = None if self._is_new or start == "base" else policy_adapter(policy)
        self._copies_adapter = self.options.adapter is None and start == "adapter"
        self._reference_adapter = self.options.adapter
        tensors = self._base_tensors if pinned is None else digest_tensors(policy, pinned)
        self._identity = ReferenceIdentity(
            provider="adapter",
            digest=combine_digests(policy, tensors, pinned),
            details={"reference": self.options.adapter or start},
        )

    def setup(self, context: ReferenceContext) -> None:
        policy = peft_model_of(context.policy)
        if self._is_new:
            check_policy(policy, "adapter")
        own = policy_adapter(policy)
        if self._copies_adapter:
            self._reference_adapter = add_reference_adapter(policy, own)
        if self._reference_adapter is not None:
            freeze_adapter(policy, self._reference_adapter)
        if self._is_new:
            rewritten = rewritten_tensors(self._base_tensors, policy, self._base_dtypes)
            if rewritten and self.options.start is None:
                method = getattr(policy.peft_config[own], "init_lora_weights", None)
                raise ImpureReferenceError(
                    f"The adapter's initialization (init_lora_weights={method!r}) rewrote {len(rewritten)} weights of "
                    f"the base model ({rewritten[0]}, ...), so the policy with its adapter disabled is not the model "
                    "that was passed in. Say which reference you mean: ref_provider_kwargs={'start': 'adapter'} (the "
                    "policy as it starts: rewritten base plus a frozen copy of the initial adapter, usually right), "
                    "{'start': 'base'} (the rewritten base alone), or ref_provider='frozen' (a copy of the original)."
                )
            if self.options.start is not None:
                # The reference that was declared exists only now that PEFT has wrapped the model.
                assert self._identity is not None
                tensors = digest_tensors(policy, self._reference_adapter)
                digest = combine_digests(base_model_of(policy), tensors, None)
                self._identity = ReferenceIdentity("adapter", digest, self._identity.details)
            self._starts_as_policy = self._copies_adapter or (not rewritten and starts_as_identity(policy, own))
        else:
            self._starts_as_policy = self._copies_adapter
        self._context = context

    def identity(self) -> ReferenceIdentity:
        assert self._identity is not None, "identity() before pin()"
        return self._identity

    @contextmanager
    def declared_model(self, context: ReferenceContext) -> Iterator[nn.Module | None]:
        policy: Any = context.policy
        if not is_peft(policy):  # this is in pin(), before TRL adds the adapter
            declares_original = self.options.start is None or self._copies_adapter
            yield policy if declares_original else None
        elif self._is_new and self.options.start == "base":  # it exists only now that PEFT has wrapped the model
            with reference_active(policy, None):
                yield policy
        else:
            pinned = policy_adapter(policy) if self._copies_adapter else self.options.adapter
            with reference_active(policy, pinned):
                yield policy

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        if self._context is None:
            return []
        return canonical_tensors(peft_model_of(self._context.policy), self._reference_adapter)

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        assert self._context is not None, "log_probs() before setup()"
        policy = self._context.policy
        if policy is not self._scored_policy:  # as training begins, FSDP and DeepSpeed replace it
            self._scorer = trainer_scorer(policy, self._context, self.options.scoring)
            self._scored_policy = policy
        with reference_active(policy, self._reference_adapter):
            return self._scorer.log_probs(batch)

    @contextmanager
    def bulk_scorer(self) -> Iterator[Scorer]:
        """
        A packed scorer of the reference. It uses the policy, which must be left alone as long as the context lasts.
        """
        assert self._context is not None, "setup() comes first"
        policy = self._context.policy
        with reference_active(policy, self._reference_adapter):
            yield trainer_scorer(policy, self._context, "packed")

    def _named_adapter(self, policy: nn.Module) -> str:
        known = list(getattr(policy, "peft_config", {}))
        name = str(self.options.adapter)
        if name not in known:
            raise ConfigurationError(
                f"ref_provider='adapter': the policy has no adapter {name!r}; it has {known}."
                f"{did_you_mean(name, known)}"
            )
        if name == policy_adapter(policy):
            raise ConfigurationError(
                f"ref_provider='adapter': adapter {name!r} is the one being trained. Activate the policy's own "
                "adapter before training (`model.set_adapter(...)`), or use {'start': 'adapter'} for a frozen copy."
            )
        return name

    def close(self) -> None:
        self._context = None
        self._scored_policy = None
