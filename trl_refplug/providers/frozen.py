"""The `frozen` provider: a second copy of the policy as it was passed in, or any other model named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from trl_refplug.errors import ConfigurationError
from trl_refplug.provider import Capabilities, ReferenceBatch, ReferenceContext, ReferenceIdentity, ReferenceProvider


if TYPE_CHECKING:
    from concurrent.futures import Future

    from torch import Tensor, nn

    from trl_refplug.runtime.threads import ScoringThread
    from trl_refplug.scoring import Scorer


@dataclass(frozen=True)
class FrozenOptions:
    """Options of `frozen`."""

    model: str | None = field(
        default=None,
        metadata={"help": "Hub id or path of the reference. By default the policy exactly as it was passed in."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `model`."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Precision of the copy. By default the policy's."}
    )
    quantization_config: dict[str, Any] | None = field(
        default=None, metadata={"help": "Keyword arguments of `BitsAndBytesConfig`, to quantise `model` as it loads."}
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Where the copy lives (`cpu`, `cuda:1`). By default where the trainer would put it."},
    )
    scoring: Literal["exact", "packed"] = field(
        default="exact",
        metadata={"help": "`exact`: the trainer's own shapes, bit for bit. `packed`: shared prompts computed once."},
    )


class FrozenProvider(ReferenceProvider):
    """
    Scores with a frozen copy held in the trainer's process: twice the model memory, one forward per step.

    Without `model`, the copy is a snapshot of the policy taken before anything touched it, so that a merged or edited
    in-memory policy is its own reference (TRL reloads the reference from the policy's original path instead).

    On a device of its own (option `device`) it scores on a thread of its own, while the policy works.
    """

    Options = FrozenOptions
    capabilities = Capabilities(local_model=True, temperature=True, multimodal=True, offline=True)
    options: FrozenOptions

    def __init__(self, options: FrozenOptions | None = None, *, model: nn.Module | None = None) -> None:
        super().__init__(options)
        self._given = model
        self._module: nn.Module | None = None
        self._identity: ReferenceIdentity | None = None
        self._scorer: Any = None
        self._bulk_scorer: Any = None
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
        # Another precision gives other numbers on purpose.
        return self._given is None and self.options.model is None and self.options.dtype is None

    @property
    def device(self) -> str | None:
        return self.options.device

    @property
    def module(self) -> nn.Module | None:
        return self._module

    def pin(self, context: ReferenceContext) -> nn.Module:
        from trl_refplug.models.identity import digest_model
        from trl_refplug.providers.copies import load_model, snapshot

        if self._given is not None:
            module, name = self._given, "ref_model"
        elif self.options.model is not None:
            module, name = load_model(self.options, context.policy, context.args), self.options.model
        else:
            module, name = snapshot(context.policy, self.options.dtype, self.options.device), "policy"
        adapter = getattr(module, "active_adapter", None) if hasattr(module, "peft_config") else None
        self._identity = ReferenceIdentity(
            provider="frozen",
            digest=digest_model(module, adapter=adapter),
            details={"model": name, "revision": self.options.revision, "dtype": str(getattr(module, "dtype", ""))},
        )
        return module

    def setup(self, context: ReferenceContext) -> None:
        assert context.reference_model is not None, "the seam places what pin() returned"
        self._use(context.reference_model, context)

    def _use(self, module: nn.Module, context: ReferenceContext) -> None:
        """Score with `module`, which is placed."""
        from trl_refplug.models.modes import stay_in_evaluation_mode
        from trl_refplug.providers.scorers import trainer_scorer
        from trl_refplug.runtime.threads import ScoringThread

        self._module = module
        stay_in_evaluation_mode(self._module)  # a model passed as `ref_model=` may still be in train mode
        self._scorer = trainer_scorer(self._module, context, self.options.scoring)
        self._bulk_scorer = trainer_scorer(self._module, context, "packed")
        if self._has_own_device(context):
            self._thread = ScoringThread()
            self.capabilities = replace(self.capabilities, overlap=True)

    def _has_own_device(self, context: ReferenceContext) -> bool:
        import torch

        if self.options.device is None:
            return False
        # As tensors see them: "cuda" is the current one of several, "cpu:0" is "cpu".
        own, policys = (torch.empty(0, device=device).device for device in (self.device, context.accelerator.device))
        return own != policys

    def identity(self) -> ReferenceIdentity:
        assert self._identity is not None, "identity() before pin()"
        return self._identity

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        if self._thread is not None:
            return self.submit(batch).result()  # a model is scored by one thread at a time
        scorer: Scorer = self._scorer
        if self.options.device is None:
            return scorer.log_probs(batch)
        return scorer.log_probs(batch.to(self.options.device)).to(batch.input_ids.device)

    def submit(self, batch: ReferenceBatch) -> Future[Tensor]:
        assert self._thread is not None, "only with capabilities.overlap"
        scorer: Scorer = self._scorer
        # Moved by the caller's thread: now the batch is behind what its stream has to do already, later behind more.
        moved = batch.to(self.options.device)
        return self._thread.submit(lambda: scorer.log_probs(moved).to(batch.input_ids.device))

    @contextmanager
    def bulk_scorer(self) -> Iterator[Scorer]:
        """A packed scorer of the reference."""
        yield self._bulk_scorer

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()
        # The trainer's objects may outlive training; the copy must not.
        self._module = None
        self._given = None
        self._scorer = self._bulk_scorer = None
