"""A frozen model that is named, and loaded only when there is a row to score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trl_refplug.errors import ReferenceMismatchError
from trl_refplug.provider import ReferenceBatch, ReferenceContext, ReferenceIdentity
from trl_refplug.providers.frozen import FrozenProvider


if TYPE_CHECKING:
    from torch import Tensor, nn

    from trl_refplug.scoring import Scorer


class NamedModel(FrozenProvider):
    """
    `frozen` with option `model`, as the source of stored log-probs.

    What it takes to look rows up is remembered by the model's files when they are loaded for the first time. As long
    as the files stay as they are, later runs load them only if rows are missing.

    Only a part of other providers: it is not registered.
    """

    def pin(self, context: ReferenceContext) -> nn.Module | None:  # type: ignore[override]
        from trl_refplug.models.files import fingerprint, recall, remember
        from trl_refplug.providers.cached.row_keys import ModelFacts
        from trl_refplug.providers.copies import loading
        from trl_refplug.runtime.ranks import all_ranks

        assert self.options.model is not None
        self._loading = loading(self.options, context.policy, context.args)
        decides = {**self._loading, "dtype": str(self._loading["dtype"])}
        known_by = None
        if not decides["trust_remote_code"] and not {"quantization_config", "subfolder"} & decides.keys():
            known_by = fingerprint(self.options.model, self.options.revision, decides)
        self._known_by = known_by
        self._context: ReferenceContext | None = None
        # ZeRO-1 and ZeRO-2 place a model collectively, and later one rank may have rows to score when others have none
        engine = context.args.deepspeed_plugin
        recalled = recall(known_by) if engine is None or engine.zero_stage == 3 else None
        if all_ranks(recalled is not None):  # where some have to load a model, all do: TRL places it collectively
            assert recalled is not None
            self._identity = ReferenceIdentity.from_dict(recalled["identity"])
            self.model_facts = ModelFacts(**recalled["model"])
            return None
        module = super().pin(context)
        self.model_facts = ModelFacts.of(module)
        if fingerprint(self.options.model, self.options.revision, decides) == known_by:
            remember(known_by, {"identity": self.identity().to_dict(), "model": self.model_facts.to_dict()})
        return module

    def setup(self, context: ReferenceContext) -> None:
        self._context = context
        if context.reference_model is not None:
            self._use(context.reference_model, context)

    @property
    def idle(self) -> bool:
        """Whether the model has not been needed so far."""
        return self._module is None

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        self._load()
        return super().log_probs(batch)

    @contextmanager
    def bulk_scorer(self) -> Iterator[Scorer]:
        self._load()
        with super().bulk_scorer() as scorer:
            yield scorer

    def _load(self) -> None:
        from trl_refplug.models.files import forget
        from trl_refplug.models.identity import digest_model
        from trl_refplug.providers.copies import load_named
        from trl_refplug.runtime.random_state import rng_kept

        if not self.idle:
            return
        context: Any = self._context
        assert context is not None, "setup() comes first"
        with rng_kept():
            module = load_named(str(self.options.model), self._loading)
            digest = digest_model(module)
            if digest != self.identity().digest:
                forget(self._known_by)
                raise ReferenceMismatchError(
                    f"The files of {self.options.model!r} have the names, sizes and times they had when they were "
                    f"digested, and another content: found digest {digest}, expected {self.identity().digest}. "
                    "Nothing was scored, and what was remembered of them is forgotten: run again."
                )
            self._use(context.place(module, device=self.options.device), context)

    def close(self) -> None:
        super().close()
        self._context = None
