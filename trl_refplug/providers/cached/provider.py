"""The `cached` provider: log-probs of another provider, kept in a store on disk and found by the content of rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl_refplug.errors import ConfigurationError
from trl_refplug.models.adapters import is_peft
from trl_refplug.models.tolerances import AUTOCAST_DTYPES, rounds_float32, tolerance_for
from trl_refplug.models.traits import traits_of
from trl_refplug.provider import ReferenceBatch, ReferenceContext, ReferenceIdentity, ReferenceProvider, SampleCheck
from trl_refplug.providers.cached.filler import Filler
from trl_refplug.providers.cached.missing_rows import check_known_ahead
from trl_refplug.providers.cached.policy_source import PolicySource
from trl_refplug.providers.cached.row_keys import RowKeys
from trl_refplug.providers.frozen import FrozenProvider
from trl_refplug.providers.options import CACHED_CAPABILITIES, CachedOptions
from trl_refplug.runtime.caches import cache_directory
from trl_refplug.store import LogProbStore, ScoringFacts


logger = logging.getLogger("trl_refplug")


class CachedProvider(ReferenceProvider):
    """
    Looks log-probs up in a store, and has those that are missing scored, once.

    Rows are found by their content: tokens, scored positions, the reference's digest and the precision. So they are
    found however they are batched, shuffled or reduced, and they are not found if anything changes that decides their
    values.
    """

    Options = CachedOptions
    capabilities = CACHED_CAPABILITIES
    options: CachedOptions

    def __init__(self, options: CachedOptions | None = None, *, model: nn.Module | None = None) -> None:
        super().__init__(options)
        self._given = model
        self._source: ReferenceProvider | None = None
        self._store: Any = None
        self._hits = self._misses = 0
        self._sample_check: SampleCheck | None = None
        chosen = self.options
        if model is not None and chosen.source is not None:
            raise ConfigurationError(
                f"A reference model was passed to the trainer (`ref_model=`), which is what `cached` scores with, and "
                f"option source={chosen.source!r} names another source. Keep one of the two."
            )
        if chosen.source_kwargs is not None and chosen.source is None:
            raise ConfigurationError("ref_provider='cached': option 'source_kwargs' needs option 'source'.")
        if chosen.source == "cached":
            raise ConfigurationError("ref_provider='cached': a store cannot be its own source. Name another one.")
        if chosen.verify is not None and chosen.verify < 0:
            raise ConfigurationError(f"ref_provider='cached': option 'verify' must not be negative: {chosen.verify}.")
        if chosen.verify and chosen.fill == "lazy":
            raise ConfigurationError(
                f"ref_provider='cached': verify={chosen.verify} has stored rows scored again at the start, and with "
                "fill='lazy' nothing is looked up before training asks for it. Remove 'verify', or use fill='ahead'."
            )

    @property
    def starts_as_policy(self) -> bool:
        return self._scored_by.starts_as_policy

    @property
    def module(self) -> nn.Module | None:
        return self._source.module if self._source is not None else None

    @property
    def sample_check(self) -> SampleCheck | None:
        return self._sample_check

    @property
    def _scored_by(self) -> ReferenceProvider:
        assert self._source is not None, "pin() comes first"
        return self._source

    def pin(self, context: ReferenceContext) -> None:
        if self._given is not None:
            source = context.adopt(FrozenProvider(model=self._given))
            self._given = None
        elif self.options.source is not None:
            source = context.create(self.options.source, self.options.source_kwargs, may_load_late=True)
        elif is_peft(context.policy) or context.peft_config is not None:
            source = context.create("adapter")
        else:
            source = context.adopt(PolicySource())
        if source.capabilities.before_training_only and self.options.fill == "lazy":
            raise ConfigurationError(
                "ref_provider='cached': with fill='lazy' rows are scored while the policy is being trained, so it "
                "cannot be scored in place of the reference. Use fill='ahead' where the data set is known "
                'beforehand, or name a source: {"source": "frozen"} (a second copy), {"source": "frozen", '
                '"source_kwargs": {"model": ...}}.'
            )
        if not source.capabilities.offline or source.capabilities.moving:
            raise ConfigurationError(
                f"ref_provider='cached' stores what never changes, and source={self.options.source!r} answers "
                "differently as training goes on. Use another source."
            )
        self._source = source

    def setup(self, context: ReferenceContext) -> None:
        self._context = context
        source = self._scored_by
        self._traits = source.model_traits or traits_of(source.module or context.policy)
        self._keys = self._row_keys(context)
        self._filler = self._make_filler(context)
        self._store = self._open(self.options.path or default_path())
        if self.options.fill == "ahead":
            check_known_ahead(context, source)
        if self.options.fill != "lazy" and not self.fills_as_training_begins:
            self._prepare()
        if self.options.fill == "lazy":
            self._filler.probe.compare_with(self._store)
        if self.options.fill == "lazy" and context.online:
            logger.warning(
                "ref_provider='cached' with a trainer that generates its completions: they are new in every step, so "
                "the store never has them, and grows for nothing. Use the source itself as `ref_provider`."
            )

    @property
    def fills_as_training_begins(self) -> bool:
        """
        Whether missing rows are scored in `on_train_begin`, and not in `setup`, because a policy is sharded only then.
        """
        return self._filler.waits_for_training

    def on_train_begin(self) -> None:
        if self.fills_as_training_begins:
            self._prepare()

    def _prepare(self) -> None:
        self._sample_check = self._filler.prepare(self._store)
        accelerator = self._context.accelerator
        if accelerator.num_processes > 1 and self.options.fill == "ahead":
            accelerator.wait_for_everyone()
            # It is opened again, so that all ranks read the same values for a key that the store has twice.
            self._store.close()
            self._store = self._open(self._store.location)
            self._filler.check_complete(self._store)

    def identity(self) -> ReferenceIdentity:
        source = self._scored_by.identity()
        return ReferenceIdentity("cached", source.digest, {"source": source.provider}, (source,))

    # The probe is asked of the source itself, because a store only repeats the source's answers.

    def declared_model(self, context: ReferenceContext) -> AbstractContextManager[None]:
        return nullcontext()

    def probe(self, batch: ReferenceBatch) -> None:
        return None

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        return ()

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        rows = self._keys.rows_of_batch(batch)
        values = self._keys.look_up(self._store, rows)
        missing = [index for index, value in enumerate(values) if value is None]
        self._hits += len(rows) - len(missing)
        self._misses += len(missing)
        if missing:
            scored = self._filler.score_missing(self._store, batch, rows, missing)
            for index, found in zip(missing, scored, strict=True):
                values[index] = found
            facts = self._keys.packed if self._scores_packed else self._keys.exact
            self._store.put(rows.keys(facts, missing), scored)
        return rows.padded.to_log_probs(values).to(batch.input_ids.device)

    def counters(self) -> dict[str, float]:
        return {"hits": self._hits, "misses": self._misses}

    def metadata(self) -> dict[str, Any]:
        return {"path": self._store.location, "rows": len(self._store)}

    def save_state(self, directory: Path) -> None:
        self._store.flush()

    def on_train_end(self) -> None:
        self._store.flush()

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    @property
    def _scores_packed(self) -> bool:
        return self._scored_by.scoring == "packed"

    def _open(self, path: str) -> LogProbStore:
        if self.options.fill == "never":
            return LogProbStore(path, mode="r")
        reference = self._scored_by.identity().to_dict()
        return LogProbStore(path, mode="a", provenance={"reference": reference, "scoring": asdict(self._keys.exact)})

    def _make_filler(self, context: ReferenceContext) -> Filler:
        dtype = getattr(torch, self._traits.dtype)
        tolerance = tolerance_for(str(context.accelerator.mixed_precision), dtype, context.accelerator.device.type)
        chosen = self.options
        return Filler(context, self._scored_by, self._keys, tolerance, fill=chosen.fill, verify=chosen.verify)

    def _row_keys(self, context: ReferenceContext) -> RowKeys:
        precision = str(context.accelerator.mixed_precision)
        computed_in = None if precision == "no" else str(AUTOCAST_DTYPES.get(precision, precision))
        computed_in = computed_in and computed_in.removeprefix("torch.")
        if computed_in is None and self._traits.dtype == "float32" and rounds_float32(context.accelerator.device.type):
            computed_in = "tf32"
        engine = context.args.deepspeed_plugin if self._scored_by.capabilities.local_model else None
        if engine is not None and computed_in not in (None, self._traits.dtype):
            computed_in = f"{computed_in} weights"  # DeepSpeed rounds the weights, too, unlike autocast

        def facts(mode: str) -> ScoringFacts:
            return ScoringFacts(
                identity_digest=self._scored_by.identity().digest,
                attention_implementation=self._traits.attention_implementation,
                scoring_mode=mode,
                temperature=context.temperature,
                cast_lm_head_to_fp32=bool(getattr(context.args, "cast_lm_head_to_fp32", False)),
                autocast_dtype=computed_in,
            )

        return RowKeys(facts("packed"), facts("exact"), self._traits)


def default_path() -> str:
    """Where log-probs are kept if the option `path` is not set: in one store per user, for all runs."""
    return str(cache_directory("log-probs"))
