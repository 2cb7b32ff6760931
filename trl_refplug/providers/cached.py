"""The `cached` provider: log-probs of another provider, kept on disk and keyed by content."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_refplug.errors import ConfigurationError, MissingRowError, StoreError
from trl_refplug.provider import Capabilities, ReferenceBatch, ReferenceContext, ReferenceIdentity, ReferenceProvider


if TYPE_CHECKING:
    from torch import Tensor, nn

    from trl_refplug.providers.caching.filling import SampleCheck
    from trl_refplug.providers.caching.row_keys import BatchRows, RowKeys
    from trl_refplug.store import LogProbStore


logger = logging.getLogger("trl_refplug")

_TOKENS_SHOWN = 12
_VERIFIED_ROWS = 4


@dataclass(frozen=True)
class CachedOptions:
    """Options of `cached`."""

    path: str | None = field(
        default=None,
        metadata={
            "help": "Directory or fsspec URL of the store, shared by any number of runs. By default "
            "`~/.cache/trl-refplug/log-probs`."
        },
    )
    source: str | None = field(
        default=None,
        metadata={
            "help": "Name of the provider that scores missing rows. By default the policy itself, before it is "
            "trained: no second model."
        },
    )
    source_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "Options of `source`."})
    fill: Literal["ahead", "lazy", "never"] = field(
        default="ahead",
        metadata={
            "help": "`ahead`: score all missing rows before training. `lazy`: score them when training asks for "
            "them. `never`: a missing row is an error."
        },
    )
    verify: int | None = field(
        default=None,
        metadata={
            "help": "How many stored rows are scored again at the start, to be sure of them. By default 4, and none "
            "where that would take a model or a server that nothing else needs."
        },
    )


class CachedProvider(ReferenceProvider):
    """
    Looks log-probs up in a store, and has what is missing scored once.

    Rows are found by what they are (tokens, scored positions, the reference's digest, precision), so nothing that
    only changes how they are batched, shuffled or reduced misses, and nothing that changes a value hits.
    """

    Options = CachedOptions
    capabilities = Capabilities(local_model=True, temperature=True, multimodal=False, offline=True)
    options: CachedOptions

    def __init__(self, options: CachedOptions | None = None, *, model: nn.Module | None = None) -> None:
        super().__init__(options)
        self._given = model
        self._source: ReferenceProvider | None = None
        self._owns_source = True
        self._store: Any = None
        self._hits = self._misses = 0
        self.sample_check: SampleCheck | None = None
        """How far the stored rows that were scored again at the start are from what the store has."""
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

    @property
    def starts_as_policy(self) -> bool:
        return self._scored_by.starts_as_policy

    @property
    def device(self) -> str | None:
        return self._source.device if self._source is not None and self._owns_source else None

    @property
    def module(self) -> nn.Module | None:
        return self._source.module if self._source is not None else None

    @property
    def _scored_by(self) -> ReferenceProvider:
        assert self._source is not None, "pin() comes first"
        return self._source

    def pin(self, context: ReferenceContext) -> nn.Module | None:
        from trl_refplug.options import parse_options
        from trl_refplug.providers.caching.borrowed import BorrowedPolicy
        from trl_refplug.providers.caching.named_model import NamedModel
        from trl_refplug.providers.frozen import FrozenOptions, FrozenProvider
        from trl_refplug.providers.peft_policy import is_peft

        if self._given is not None:
            self._source, self._given = FrozenProvider(model=self._given), None
        elif self.options.source == "frozen" and (self.options.source_kwargs or {}).get("model") is not None:
            self._source = NamedModel(parse_options("frozen", FrozenOptions, self.options.source_kwargs))
        elif self.options.source is not None:
            self._owns_source = False
            self._source = context.create(self.options.source, self.options.source_kwargs)
        elif is_peft(context.policy) or context.peft_config is not None:
            self._owns_source = False
            self._source = context.create("adapter")
        else:
            if self.options.fill == "lazy":
                raise ConfigurationError(
                    "ref_provider='cached': with fill='lazy' rows are scored while the policy is being trained, so it "
                    "cannot be scored in place of the reference. Use fill='ahead' where the data set is known "
                    'beforehand, or name a source: {"source": "frozen"} (a second copy), {"source": "frozen", '
                    '"source_kwargs": {"model": ...}}.'
                )
            self._source = BorrowedPolicy()
        if not self._source.capabilities.offline or self._source.capabilities.moving:
            raise ConfigurationError(
                f"ref_provider='cached' stores what never changes, and source={self.options.source!r} answers "
                "differently as training goes on. Use another source."
            )
        return self._source.pin(context) if self._owns_source else None

    def setup(self, context: ReferenceContext) -> None:
        from trl_refplug.providers.caching.filling import check_known_ahead
        from trl_refplug.providers.caching.row_keys import ModelFacts

        self._context = context
        source = self._scored_by
        if self._owns_source:
            source.setup(context)
        self._model_facts = getattr(source, "model_facts", None) or ModelFacts.of(source.module or context.policy)
        self._keys = self._row_keys(context)
        # A model over which all ranks have a part is run by all of them at once, or not at all.
        self._in_step = _sharded(context.accelerator) and source.capabilities.local_model
        self._store = self._open(self.options.path or default_path())
        if self.options.fill == "ahead":
            check_known_ahead(context, source)
        if self.options.fill != "lazy" and not self.fills_as_training_begins:
            self._prepare(context)
        if (
            self.options.fill == "lazy"
            and context.planned("train") is None
            and hasattr(context.args, "num_generations")
        ):
            logger.warning(
                "ref_provider='cached' with a trainer that generates its completions: they are new in every step, so "
                "the store never has them, and grows for nothing. Use the source itself as `ref_provider`."
            )

    @property
    def fills_as_training_begins(self) -> bool:
        """Whether missing rows are scored not in `setup` but in `on_train_begin`: a policy is not sharded before."""
        return self._in_step and self.options.fill == "ahead"

    def on_train_begin(self) -> None:
        if self.fills_as_training_begins:
            self._prepare(self._context)

    def identity(self) -> ReferenceIdentity:
        source = self._scored_by.identity()
        return ReferenceIdentity("cached", source.digest, {"source": source.provider}, (source,))

    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        rows = self._keys.of(batch)
        values = self._keys.find(self._store, rows)
        missing = [index for index, value in enumerate(values) if value is None]
        self._hits += len(rows) - len(missing)
        self._misses += len(missing)
        if missing:
            scored = self._score(batch, rows, missing)
            for line, index in enumerate(missing):
                values[index] = rows.take(scored, index, line)
            facts = self._keys.packed if self._scores_packed else self._keys.exact
            self._store.put(rows.keys(facts, missing), [values[index] for index in missing])
        return rows.place(values, batch)

    def counters(self) -> dict[str, float]:
        return {"hits": self._hits, "misses": self._misses}

    def metadata(self) -> dict[str, Any]:
        return {"path": self._store.location, "rows": len(self._store)}

    def save_state(self, directory: Path) -> None:
        self._store.flush()

    def on_train_end(self) -> None:
        self._store.flush()

    def close(self) -> None:
        try:
            if self._store is not None:
                self._store.close()
        finally:
            if self._source is not None and self._owns_source:
                self._source.close()

    # What is looked up

    @property
    def _source_at_hand(self) -> bool:
        """Whether scoring a row takes no more than what is in this process anyway."""
        return self._scored_by.capabilities.local_model and not getattr(self._scored_by, "idle", False)

    @property
    def _scores_packed(self) -> bool:
        return getattr(self._scored_by.options, "scoring", "exact") == "packed"

    def _open(self, path: str) -> LogProbStore:
        from trl_refplug.store import LogProbStore

        if self.options.fill == "never":
            return LogProbStore(path, mode="r")
        reference = self._scored_by.identity().to_dict()
        return LogProbStore(path, mode="a", provenance={"reference": reference, "scoring": asdict(self._keys.exact)})

    def _row_keys(self, context: ReferenceContext) -> RowKeys:
        from trl_refplug.providers.caching.row_keys import RowKeys
        from trl_refplug.store import ScoringFacts
        from trl_refplug.tolerances import AUTOCAST_DTYPES

        autocast = AUTOCAST_DTYPES.get(str(context.accelerator.mixed_precision))

        def facts(mode: str) -> ScoringFacts:
            return ScoringFacts(
                identity_digest=self._scored_by.identity().digest,
                attention_implementation=self._model_facts.attention_implementation,
                scoring_mode=mode,
                temperature=context.temperature,
                cast_lm_head_to_fp32=bool(getattr(context.args, "cast_lm_head_to_fp32", False)),
                autocast_dtype=None if autocast is None else str(autocast).removeprefix("torch."),
            )

        return RowKeys(facts("packed"), facts("exact"), self._model_facts)

    # What is scored

    def _prepare(self, context: ReferenceContext) -> None:
        """Look up all that training will ask for, score what is missing, and verify some of the rest."""
        from trl_refplug.providers.caching.filling import check_sample, fill, planned_blocks, survey
        from trl_refplug.providers.scorers import trainer_precision
        from trl_refplug.ranks import any_rank, least

        if context.planned("train") is None:
            return  # fill='never': each batch is looked up as it comes
        accelerator = context.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        sample = _VERIFIED_ROWS if self.options.verify is None else self.options.verify
        blocks = planned_blocks(context, self._keys)
        found = survey(self._store, blocks, self._keys, verify=sample, rank=rank, ranks=ranks)
        missing = bool(found.missing)
        if self.fills_as_training_begins:  # one rank may see more of the store than others, and all do the same
            missing = any_rank(missing)
            found.sample = found.sample[: least(len(found.sample))]
        source_needed = (missing and self.options.fill != "never") or self.options.verify is not None
        # As training begins it may be resumed, so that the policy is not its own reference any more.
        may_score = not getattr(self._scored_by, "gone", False) and (
            not self._in_step or self.fills_as_training_begins
        )
        if may_score and (source_needed or self._source_at_hand):
            with trainer_precision(accelerator):
                tolerance = self._tolerance(context)
                self.sample_check = check_sample(found, self._scored_by, accelerator.device, tolerance)
        if missing:
            if self.options.fill == "never":
                assert found.first is not None
                raise MissingRowError(
                    f"{len(found.missing):,} of the {found.rows:,} rows that training will ask for are not in the "
                    f"store {self._store.location!r}; the first is planned row {found.first.number}, "
                    f"{self._shown(found.first.row.input_ids)}. {self._why_not_scored()}"
                )
            if found.mine or self._in_step:
                with trainer_precision(accelerator):
                    fill(
                        self._store,
                        planned_blocks(context, self._keys),
                        self._keys,
                        found,
                        self._scored_by,
                        accelerator.device,
                        progress=accelerator.is_main_process and not context.args.disable_tqdm,
                        any_rank=any_rank if self._in_step else None,
                    )
        if ranks > 1:
            self._meet(context)

    def _meet(self, context: ReferenceContext) -> None:
        """Ranks wait for each other, and read what all of them have published."""
        from trl_refplug.providers.caching.filling import planned_blocks, survey

        context.accelerator.wait_for_everyone()
        self._store.close()
        self._store = self._open(self._store.location)
        left = survey(self._store, planned_blocks(context, self._keys), self._keys)
        if left.missing:
            raise StoreError(
                f"{len(left.missing):,} rows that other ranks have scored are not in {self._store.location!r} as rank "
                f"{context.accelerator.process_index} sees it. Use a `path` that all nodes share."
            )

    def _score(self, batch: ReferenceBatch, rows: BatchRows, missing: list[int]) -> Tensor:
        from trl_refplug.providers.caching.row_keys import select
        from trl_refplug.providers.scorers import trainer_precision

        first = rows.rows[missing[0]].input_ids
        what = f"Row {missing[0]} of the batch, {self._shown(first)}, is not in the store {self._store.location!r}"
        if self.options.fill == "never" or self._in_step:
            raise MissingRowError(f"{what}. {self._why_not_scored()}")
        try:
            with trainer_precision(self._context.accelerator):
                return self._scored_by.log_probs(select(batch, missing))
        except MissingRowError as error:
            raise MissingRowError(f"{what}, and {error}") from None

    def _why_not_scored(self) -> str:
        if self.options.fill == "never":
            return "fill='never' scores nothing: use fill='ahead' or 'lazy', or another path."
        return (
            "A model that is sharded over ranks (FSDP, DeepSpeed) cannot score rows one rank at a time. Use "
            "fill='ahead', which scores all rows of the run as training begins, or a source that is not in this "
            'process: {"source": "remote", "source_kwargs": {"url": ...}}.'
        )

    def _tolerance(self, context: ReferenceContext) -> Any:
        import torch

        from trl_refplug.tolerances import tolerance_for

        return tolerance_for(str(context.accelerator.mixed_precision), getattr(torch, self._model_facts.dtype))

    def _shown(self, token_ids: Any) -> str:
        decode = getattr(self._context.processing_class, "decode", None)
        start = token_ids[:_TOKENS_SHOWN].tolist()
        return f"which begins {decode(start) if decode else start!r}"


def default_path() -> str:
    """Where log-probs are kept unless `path` says otherwise: one store a user, for all runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(cache) / "trl-refplug" / "log-probs")


def _sharded(accelerator: Any) -> bool:
    return str(getattr(accelerator.distributed_type, "value", "")) in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
