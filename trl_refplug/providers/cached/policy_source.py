"""The policy as its own reference, for as long as it has not been trained. This needs no second model at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trl_refplug.errors import MissingRowError, ReferenceMismatchError
from trl_refplug.models.identity import combine_digests, digest_tensors, tensor_dtypes
from trl_refplug.models.tolerances import AUTOCAST_DTYPES
from trl_refplug.provider import Capabilities, ReferenceBatch, ReferenceContext, ReferenceIdentity, ReferenceProvider
from trl_refplug.providers.trainer_scoring import trainer_scorer
from trl_refplug.scoring import Scorer


class PolicySource(ReferenceProvider):
    """
    Scores with the policy of full fine-tuning before its first step. After that, the policy is not the reference any
    more.

    It is not registered, and can only be a part of another provider, because it cannot answer during training.
    """

    capabilities = Capabilities(
        local_model=True,
        temperature=True,
        multimodal=True,
        offline=True,
        scores_policy=True,
        before_training_only=True,
    )

    @property
    def starts_as_policy(self) -> bool:
        return True

    def pin(self, context: ReferenceContext) -> None:
        self._tensors = digest_tensors(context.policy)
        self._dtypes = tensor_dtypes(context.policy)
        self._rounded = self._tensors
        dtype = _engine_dtype(context.args)
        if dtype is not None:  # DeepSpeed casts the weights themselves, unlike autocast
            dtypes = {name: dtype if known.is_floating_point else known for name, known in self._dtypes.items()}
            self._rounded = digest_tensors(context.policy, dtypes=dtypes)
        digest = combine_digests(context.policy, self._tensors)
        self._identity = ReferenceIdentity("policy", digest, {"dtype": str(getattr(context.policy, "dtype", ""))})

    def setup(self, context: ReferenceContext) -> None:
        self._context: ReferenceContext | None = context
        self._unmoved: list[tuple[int, int]] = []

    def identity(self) -> ReferenceIdentity:
        return self._identity

    @property
    def unavailable(self) -> str:
        moved = self._context is None or self._context.policy_moved
        return "the reference is the policy as it started, which has moved since" if moved else ""

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        context = self._usable()
        return trainer_scorer(context.policy, context, "exact").log_probs(batch)

    @contextmanager
    def bulk_scorer(self) -> Iterator[Scorer]:
        """
        A packed scorer of the reference. It uses the policy, which must be left alone as long as the context lasts.
        """
        context = self._usable()
        yield trainer_scorer(context.policy, context, "packed")

    def _usable(self) -> ReferenceContext:
        context = self._context
        assert context is not None, "setup() comes first"
        if context.policy_moved:
            raise MissingRowError(
                f"{self.unavailable}. Name a model that can be scored "
                'at any time, such as ref_provider_kwargs={"source": "frozen", "source_kwargs": {"model": ...}} with '
                "the policy's own path (the same weights give the same keys), or fill the store before training."
            )
        policy: Any = context.policy
        # This is checked before every use. The weights are digested again only if something has written to them since.
        state = [(tensor.data_ptr(), tensor._version) for tensor in policy.state_dict(keep_vars=True).values()]
        if state != self._unmoved:
            found = digest_tensors(policy, dtypes=self._dtypes)
            changed = [name for name, digest in self._tensors.items() if found.get(name) != digest]
            if changed and self._rounded is not self._tensors:
                found = digest_tensors(policy)
                changed = [name for name, digest in self._rounded.items() if found.get(name) != digest]
            if changed:
                raise ReferenceMismatchError(
                    f"{len(changed)} weights of the policy ({changed[0]}, ...) are not those that were passed in, so "
                    "it cannot be scored in place of the reference. Change the policy before the trainer is built, or "
                    'use ref_provider_kwargs={"source": "frozen", ...}.'
                )
            self._unmoved = state
        return context

    def close(self) -> None:
        self._context = None


def _engine_dtype(args: Any) -> torch.dtype | None:
    """The dtype that DeepSpeed will cast the policy to; `None` if it is not cast."""
    if args.deepspeed_plugin is None:
        return None
    asked = (name for name in AUTOCAST_DTYPES if getattr(args, name) or getattr(args, f"{name}_full_eval"))
    return AUTOCAST_DTYPES.get(next(asked, str(args.mixed_precision)))
