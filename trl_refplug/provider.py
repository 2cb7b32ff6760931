"""
What a reference provider is: the contract between the trainers, which ask for the reference's log-probabilities, and
the providers, which answer.

This module knows no provider and no trainer, and imports no torch, so that listing providers stays instant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable


if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    import numpy as np
    from accelerate import Accelerator
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from trl_refplug.rows.row import Row


STATE_DIRECTORY = "refplug/state"
"""The directory in a trainer's checkpoint in which providers write their state (`save_state`)."""


@dataclass(frozen=True)
class ReferenceBatch:
    """
    Rows to score, as the trainer collated them.

    Args:
        input_ids (`Tensor`): int64 `[batch, seq]`, padded on either side.
        attention_mask (`Tensor`): `[batch, seq]`, 1 for real tokens and 0 for padding.
        labels (`Tensor`): int64 `[batch, seq]`; the token id where it is scored, -100 elsewhere. Unshifted: the
            log-prob of `labels[:, t]` is found at position `t - 1` of the answer.
        extras (`Mapping[str, Tensor]`): further model inputs (`pixel_values`, `token_type_ids`, ...).
        rows_sliceable (`bool`): `False` where `extras` are indexed by patch or tile and not by row, so that the batch
            can only be scored whole.
        rows_per_pass (`int` or `None`): How many rows the trainer itself would score in one forward pass, where that
            is less than all of them. A provider that scores more at a time answers for the memory that it takes.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    rows_sliceable: bool = True
    rows_per_pass: int | None = None

    def in_passes(self) -> list[ReferenceBatch]:
        """The batch in pieces of `rows_per_pass` rows, as the trainer itself would score it."""
        rows, size = len(self.input_ids), self.rows_per_pass
        if size is None or size >= rows or not self.rows_sliceable:
            return [self]
        return [self._rows(start, start + size) for start in range(0, rows, size)]

    def _rows(self, start: int, end: int) -> ReferenceBatch:
        rows = len(self.input_ids)
        row_wise = {name for name, value in self.extras.items() if tuple(value.shape[:1]) == (rows,)}
        return replace(
            self,
            input_ids=self.input_ids[start:end],
            attention_mask=self.attention_mask[start:end],
            labels=self.labels[start:end],
            extras={name: value[start:end] if name in row_wise else value for name, value in self.extras.items()},
        )

    def copy(self) -> ReferenceBatch:
        """A copy of the batch, which shares no memory with it."""
        return replace(
            self,
            input_ids=self.input_ids.clone(),
            attention_mask=self.attention_mask.clone(),
            labels=self.labels.clone(),
            extras={n: value.clone() if hasattr(value, "clone") else value for n, value in self.extras.items()},
        )

    def to(self, device: Any) -> ReferenceBatch:
        """The batch with every tensor on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            extras={name: value.to(device) if hasattr(value, "to") else value for name, value in self.extras.items()},
        )


@dataclass(frozen=True)
class Capabilities:
    """
    What a provider can do. Misuse is refused before any long work starts.

    Args:
        local_model (`bool`): Holds or borrows a model in the trainer's process.
        moving (`bool`): The reference changes during training; `on_step_end` is called after every optimizer step.
            This is what TRL's `sync_ref_model` asks for.
        overlap (`bool`): `submit` may be called ahead of time, from the trainer's thread, while the policy works. Not
            for a moving reference.
        temperature (`bool`): Divides logits by the trainer's temperature, as GRPO and RLOO require when it is not 1.
        multimodal (`bool`): Scores batches with `extras`.
        offline (`bool`): Gives the same values whether asked before or during training, so they can be stored.
        stored (`bool`): Answers with values that were scored before and are kept on disk, in what the option `path`
            names. This is what TRL's `precompute_ref_log_probs` asks for.
        accepts_model (`bool`): Takes the model that was passed to the trainer as `ref_model=`: the constructor has a
            keyword argument `model` for it.
        scores_policy (`bool`): Scores with the policy's own weights: as it was before its first step, or with its
            adapter disabled. Whatever casts or changes those changes the reference's values.
        before_training_only (`bool`): Can be asked only before the first step, as a policy that is its own reference.
            Such a provider cannot be selected; it fills a store.
        needs_peft (`bool`): Answers for a PEFT policy only.
    """

    local_model: bool = False
    moving: bool = False
    overlap: bool = False
    temperature: bool = False
    multimodal: bool = False
    offline: bool = False
    stored: bool = False
    accepts_model: bool = False
    scores_policy: bool = False
    before_training_only: bool = False
    needs_peft: bool = False


@dataclass(frozen=True)
class ModelTraits:
    """
    What decides, besides the identity, which of a reference's values may be stored and found again.

    Args:
        attention_implementation (`str`): `"sdpa"`, `"eager"`, ...
        absolute_positions (`bool`): Whether padding on the left of a row changes its log-probs.
        length_limit (`int` or `None`): The longest batch in which rows do not depend on each other's length; `None` if
            there is no such limit.
        dtype (`str`): The dtype of its weights: `"bfloat16"`, ...
    """

    attention_implementation: str
    absolute_positions: bool
    length_limit: int | None
    dtype: str


class BulkScorer(Protocol):
    """Scores a stream of rows. It decides itself how many rows one forward pass takes, and in which order."""

    def score_passes(self, rows: Iterable[Row]) -> Iterator[list[tuple[int, Tensor]]]:
        """
        Score any number of rows.

        Args:
            rows (`Iterable[Row]`): Read as far ahead as is useful.

        Yields:
            `list[tuple[int, Tensor]]`: The answers of one forward pass, as soon as it is done. Each has the row's
            index in `rows` and the log-probabilities of its scored tokens, in order: float32 `[scored]` on the CPU.
            Every row is answered once; the order of rows is free.
        """


@runtime_checkable
class ScoresInBulk(Protocol):
    """
    An optional ability of a provider: to score many rows at a time that are not one of the trainer's batches. A store
    is filled with it. Without it, the store asks for one batch after the other.
    """

    def bulk_scorer(self) -> AbstractContextManager[BulkScorer]:
        """
        A scorer of the reference. If it uses the policy, the policy must be left alone as long as the context lasts.
        """


@dataclass(frozen=True)
class SampleCheck:
    """How far stored rows are from the same rows scored again: how many rows, and nats per token."""

    rows: int
    largest: float
    mean: float


@runtime_checkable
class VerifiesStoredRows(Protocol):
    """An optional ability of a provider that is `stored`: at the start it scores some of its rows again."""

    @property
    def sample_check(self) -> SampleCheck | None:
        """What came of it; `None` if no row was scored again."""


@dataclass(frozen=True)
class ReferenceIdentity:
    """
    Which distribution a provider answers with. Two identities with the same digest give the same log-probs.

    Args:
        provider (`str`): Name the provider is registered under.
        digest (`str`): Hex digest of all that changes the number: weights, configuration, adapter state.
        details (`Mapping[str, Any]`): The same for people: model name, adapter, dtype. JSON values only.
        parts (`tuple[ReferenceIdentity, ...]`): Identities of the providers this one is made of.
    """

    provider: str
    digest: str
    details: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[ReferenceIdentity, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The identity as JSON-serializable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReferenceIdentity:
        """The inverse of [`to_dict`]."""
        return cls(
            provider=values["provider"],
            digest=values["digest"],
            details=dict(values.get("details", {})),
            parts=tuple(cls.from_dict(part) for part in values.get("parts", ())),
        )

    def __str__(self) -> str:
        shown = ", ".join(f"{key}={value}" for key, value in self.details.items())
        return f"{self.provider}[{self.digest[:12]}]" + (f" ({shown})" if shown else "")


class ReferenceContext(Protocol):
    """
    What a provider may know of the run it serves.
    """

    @property
    def policy(self) -> nn.Module:
        """The policy. In `pin`: exactly as it was passed in; later: the trainer's model, wrapped as it is by then."""

    @property
    def accelerator(self) -> Accelerator:
        """The trainer's accelerator. Not there yet in `pin`."""

    @property
    def processing_class(self) -> Any:
        """The trainer's tokenizer or processor. Not there yet in `pin`."""

    @property
    def args(self) -> Any:
        """The trainer's arguments."""

    @property
    def temperature(self) -> float:
        """Temperature the trainer divides logits by: 1.0 for DPO and KTO."""

    @property
    def online(self) -> bool:
        """Whether the trainer generates its completions (GRPO, RLOO)."""

    @property
    def peft_config(self) -> Any:
        """The `peft_config` argument of the trainer: the adapter TRL will add to the policy, or `None`."""

    @property
    def resuming(self) -> bool:
        """Whether training goes on from a checkpoint, or `args.resume_from_checkpoint` announces it."""

    @property
    def policy_moved(self) -> bool:
        """Whether the policy may be another than the one passed in: it was trained, or a checkpoint was loaded."""

    @property
    def reference_model(self) -> nn.Module | None:
        """In `setup`: the module returned by `pin`, placed by TRL (dropout, LM head, DeepSpeed, FSDP, device)."""

    @property
    def probe_rows(self) -> NDArray[np.int64] | None:
        """
        A few short rows of text, the same for the whole run: token ids, int64 `[rows, tokens]`. The reference is asked
        about them again and again (see `ReferenceProvider.probe`). `None` where `ref_check` is off, or where there is
        no tokenizer and the policy cannot run yet.
        """

    @property
    def may_load_late(self) -> bool:
        """
        In `pin`: whether it may happen that this provider is never asked for a log-prob, because a store has all of
        them. If so, a provider that loads a model had better wait with that until it is asked for the first time,
        provided that it knows its identity without loading the model.
        """

    def create(
        self, name: str, options: Mapping[str, Any] | None = None, *, may_load_late: bool = False
    ) -> ReferenceProvider:
        """
        Make another provider, by name: for a provider that is made of others. Call it in `pin`. The new provider is
        pinned at once, and it is set up, checked and closed together with the one that asked for it.
        """

    def adopt(self, provider: ReferenceProvider, *, may_load_late: bool = False) -> ReferenceProvider:
        """Do the same with a provider instance that exists already, and need not be registered under a name."""

    def place(self, module: nn.Module, device: str | None = None) -> nn.Module:
        """
        Do to a model that was loaded after `pin` what TRL does to its own reference: switch off dropout, fuse the LM
        head, wrap it with DeepSpeed or FSDP, and move it to the trainer's device, or to `device` if that is given.
        """

    def planned(self, split: str) -> Iterable[ReferenceBatch] | None:
        """
        The rows that this run will ask for, in batches of any size. `None` if they are not known beforehand: for GRPO
        and RLOO, and for data sets that are streams. `split` is `"train"`, `"eval"` (all evaluation sets) or the name
        of one evaluation set.
        """


@dataclass(frozen=True)
class NoOptions:
    """Options of a provider that has none."""


class ReferenceProvider(ABC):
    """
    Base of all reference providers.

    The trainer's life, as a provider sees it:

    1. `__init__(options)`: keep the options, do nothing expensive.
    2. `pin(context)`: the policy is exactly as it was passed in. Snapshot, load or digest the reference now; nothing
       seen later is guaranteed to be the start of training.
    3. `setup(context)`: TRL's trainer is built. Connect, check, borrow.
    4. `on_train_begin()`: the policy is where it is trained.
    5. `log_probs(batch)` (or `submit`) for every batch; `on_step_end(step)` after every optimizer step if `moving`.
    6. `save_state`/`load_state` with every checkpoint, `close` at the end.

    Example:

    ```python
    class UniformProvider(ReferenceProvider):
        capabilities = Capabilities(temperature=True)

        def pin(self, context):
            self.vocab_size = context.policy.config.get_text_config().vocab_size

        def identity(self):
            return ReferenceIdentity("uniform", digest=f"uniform-{self.vocab_size}")

        def log_probs(self, batch):
            scored = batch.labels[:, 1:] != -100
            return scored.float() * -math.log(self.vocab_size)
    ```
    """

    Options: ClassVar[type] = NoOptions
    """
    Frozen dataclass that `ref_provider_kwargs` are parsed into; unknown or ill-typed keys are errors. A field whose
    metadata has `trl_flag` takes its value from the trainer's argument of that name where it is not given.
    """

    capabilities: Capabilities = Capabilities()
    """
    What the provider can do, declared by the class. If that depends on the options, an instance may have capabilities
    of its own; they must be final when `setup` returns.
    """

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    @property
    def starts_as_policy(self) -> bool:
        """
        Whether this reference is declared to be the policy as it starts. If so, `ref_check` compares the first answer
        of training with the policy's own log-probs.
        """
        return False

    @property
    def device(self) -> str | None:
        """Device for the module that `pin` returns; `None` for the one that TRL would put its own reference on."""
        return None

    @property
    def module(self) -> nn.Module | None:
        """
        The model in this process that is the reference, if there is one: `trainer.ref_model` shows its parameters.
        """
        return None

    @property
    def reference_adapter(self) -> str | None:
        """Name of the policy's adapter that is the reference, if there is one. It is kept, and not trained."""
        return None

    @property
    def scoring(self) -> Literal["exact", "packed"]:
        """
        Whether `log_probs` scores batches as the trainer padded them, or packed. A store keeps the two apart. GRPO and
        RLOO ask a local model that scores exactly in the trainer's slices, and any other about a whole generation
        batch.
        """
        return "exact"

    @property
    def model_traits(self) -> ModelTraits | None:
        """
        Traits of the reference's model if it is not loaded. `None` to take those of `module`, or else of the policy.
        """
        return None

    @property
    def computes_in(self) -> str | None:
        """
        Dtype that the reference computes in (`"bfloat16"`, ...). `None` to take that of `module`, or of the policy.
        """
        return None

    @property
    def at_hand(self) -> bool:
        """
        Whether a row can be scored with what is in this process already: without loading a model or asking a server.
        """
        return self.capabilities.local_model

    @property
    def unavailable(self) -> str:
        """Why no row can be scored now, as a sentence without its full stop; an empty string if rows can be scored."""
        return ""

    def pin(self, context: ReferenceContext) -> nn.Module | None:
        """
        Fix the reference while the policy is exactly as it was passed in.

        Returns:
            `nn.Module` or `None`: A model for TRL to place where its own reference would go (dropout, fused LM head,
            DeepSpeed, FSDP, device); it comes back as `context.reference_model` in `setup`. `None` to have no model.
        """
        return None

    def setup(self, context: ReferenceContext) -> None:  # noqa: B027 (optional hook)
        """Get ready to answer. Called once, when TRL's trainer is built and before any checkpoint is loaded."""

    @abstractmethod
    def identity(self) -> ReferenceIdentity:
        """Which distribution this is. It is known from `setup` on, and the same on every rank and after a resume."""

    @abstractmethod
    def log_probs(self, batch: ReferenceBatch) -> Tensor:
        """
        The reference's log-probability of every scored token.

        Args:
            batch ([`ReferenceBatch`]): Rows to score.

        Returns:
            `Tensor`: float32 `[batch, seq - 1]` in nats, on the device of `batch.input_ids`; entry `t` belongs to
            `labels[:, t + 1]` and is 0 where that is -100. The caller may change it in place.
        """

    def declared_model(self, context: ReferenceContext) -> AbstractContextManager[nn.Module | None]:
        """
        The model that *is* this reference as it is declared. While the context lasts, it is asked for its ordinary
        logits on the rows of the probe. The answers of `log_probs` are compared with these, so that whatever makes
        them wrong is noticed.

        Called right after `pin`, and once more after `setup` if there was no model (`None`) the first time. By
        default it is the policy if `starts_as_policy`, and otherwise the module that `pin` returned. If there is
        neither, the first answer of `probe` is taken for the truth.
        """
        return nullcontext(context.policy if self.starts_as_policy else context.reference_model)

    def probe(self, batch: ReferenceBatch) -> Tensor | None:
        """
        Answer the probe, in the same way as the batches of training. Called when TRL has built its trainer, as
        training begins, with every checkpoint, and at the end of training.

        Returns:
            `Tensor` or `None`: What `log_probs` would return. `None` if the reference cannot be asked now, or if it
            only repeats the answers of other providers, which are asked themselves.
        """
        return None if self.unavailable else self.log_probs(batch)

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """
        The tensors in this process, by name, that the answers are computed with and that training must not change.
        They are compared, bit for bit, between the start of training and every checkpoint. By default they are those
        of `module`, and none if the reference moves.
        """
        if self.module is None or self.capabilities.moving:
            return []
        return self.module.state_dict(keep_vars=True).items()

    def submit(self, batch: ReferenceBatch) -> Future[Tensor]:
        """
        Start on a batch that the trainer is about to ask for. Only called with `capabilities.overlap`.

        Returns at once; the future's result is what `log_probs(batch)` would return, on any thread and without
        gradient (torch's gradient mode and autocast are each thread's own). Its exception is raised at the step that
        needs the answer. A future that turns out not to be needed is cancelled; batches are submitted in the order in
        which they are needed.
        """
        raise NotImplementedError(f"{type(self).__name__} declares capabilities.overlap but has no submit()")

    def on_train_begin(self) -> None:  # noqa: B027 (optional hook)
        """
        `train()` has wrapped and placed the policy (FSDP, DeepSpeed, DDP), and loaded the checkpoint it resumes from;
        the first step comes next. Called on every rank, in every call of `train()`.
        """

    def on_step_end(self, step: int) -> None:  # noqa: B027 (optional hook)
        """Called after optimizer step `step` (from 1). Only with `capabilities.moving`."""

    def on_train_end(self) -> None:  # noqa: B027 (optional hook)
        """
        Training is over, as planned or early: write what is not on disk yet. Evaluation, or more training, may follow.
        """

    def counters(self) -> dict[str, float]:
        """Numbers for TRL's logs, reported as `ref/<name>` (cache hits, bytes sent, ...)."""
        return {}

    def metadata(self) -> dict[str, Any]:
        """JSON-serializable facts that are written into every checkpoint, beside the identity."""
        return {}

    def save_state(self, directory: Path) -> None:  # noqa: B027 (optional hook)
        """Write what a resumed run needs into `directory`, which exists. Called on every rank."""

    def load_state(self, directory: Path) -> None:  # noqa: B027 (optional hook)
        """Restore what `save_state` wrote. Called on every rank, before the first step."""

    def close(self) -> None:  # noqa: B027 (optional hook)
        """Release everything. May be called more than once."""
