"""
GRPO and RLOO: one question for a whole generation batch, answered while the rewards are computed.

TRL asks its reference in slices of `per_device_train_batch_size`, so that the completions of one prompt rarely meet in
a forward pass, and waits for each answer. Both trainers then compute the rewards, and neither looks at the answer
before they are there. Here the reference is asked once; where it can answer while the trainer works, the trainer gets
a tensor that is filled in after the rewards. Whoever reads that tensor earlier gets an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_refplug.errors import SeamError
from trl_refplug.provider import ReferenceBatch
from trl_refplug.trainers.reference_model import ReferenceModel
from trl_refplug.trainers.requested_batches import ROW_WISE, generated_labels


_FACTS = [
    *(
        vars(torch._C.TensorBase)[name].__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__),
]
"""What may be asked of log-probs that are not there yet."""


class AwaitedLogProbs(Tensor):
    """Log-probs that are not there yet. Nothing can be computed with them; filled, they are an ordinary tensor."""

    @classmethod
    def of(cls, like: Tensor, shape: tuple[int, int]) -> AwaitedLogProbs:
        """An empty place for log-probs of the dtype and on the device of `like`."""
        return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function not in _FACTS:
            raise SeamError(
                f"The trainer read the reference's log-probs ({getattr(function, '__name__', function)}) before it "
                "had computed the rewards, and they are awaited only then. Set `ref_prefetch=0`: the trainer waits "
                "for them before it goes on."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    def fill(self, values: Tensor) -> None:
        """Put the answer here, for everyone who holds this tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            self.copy_(values)
        self.__class__ = Tensor  # type: ignore[assignment]  # as torch's own uninitialized buffers do


@dataclass
class _Question:
    """A batch that was submitted in parts, and where its answer goes: the last `kept` positions of it."""

    batch: ReferenceBatch
    answers: list[Future[Tensor]]
    place: AwaitedLogProbs
    kept: int


class WholeGenerations:
    """
    Asks the reference of one trainer about whole generation batches.

    Args:
        reference ([`ReferenceModel`]): What stands in `trainer.ref_model`.
        overlap (`bool`): Whether the answers may be awaited after the rewards.
    """

    def __init__(self, reference: ReferenceModel, *, overlap: bool) -> None:
        self.reference = reference
        self._overlap = overlap
        self._rewards_to_come = False
        self._questions: list[_Question] = []

    @contextmanager
    def generation(self) -> Iterator[None]:
        """From the generation of a batch to its last use before training. Nothing asked in it is left in flight."""
        self._rewards_to_come = self._overlap
        try:
            yield
            if self._questions:
                raise SeamError(
                    "The trainer asked for the reference's log-probs and never computed rewards, after which they are "
                    "awaited. Set `ref_prefetch=0`: the trainer waits for them before it goes on."
                )
        finally:
            self._rewards_to_come = False
            for question in self._questions:
                for answer in question.answers:
                    answer.cancel()
            self._questions.clear()

    def answer(self, batch: ReferenceBatch, kept: int) -> Tensor:
        """The last `kept` log-probs of every row: there already, or filled in when the rewards are there."""
        if not self._rewards_to_come:
            return self.reference.ask(batch)[:, -kept:].contiguous()
        batch = batch.copy()  # the trainer may change its own, in place
        with torch.no_grad():
            answers = self.reference.submit(batch)
        place = AwaitedLogProbs.of(self.reference.like(batch), (len(batch.input_ids), kept))
        self._questions.append(_Question(batch, answers, place, kept))
        return place

    def rewards_are_there(self) -> None:
        """Wait for the answers and fill them in."""
        self._rewards_to_come = False
        while self._questions:
            question = self._questions[0]
            log_probs = self.reference.ask(question.batch, question.answers)
            question.place.fill(log_probs[:, -question.kept :])
            del self._questions[0]


class AsksForWholeGenerations:
    """Mixed in right above the class of TRL that asks: the reference is asked once, about all rows."""

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        ask = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        session = self._refplug_session  # type: ignore[attr-defined]
        if session is None or model is not session.reference_model:
            return ask(model, *args, **kwargs)
        given = inspect.signature(ask).bind(model, *args, **kwargs).arguments
        ids, mask, kept = given.pop("input_ids"), given.pop("attention_mask"), given.pop("logits_to_keep")
        rows = given.pop("batch_size", None)
        del given["model"]
        extras = {name: value for name, value in given.items() if value is not None and value is not False}
        if not ROW_WISE.issuperset(extras):  # images, which TRL knows how to cut
            return ask(model, *args, **kwargs)
        labels = generated_labels(ids, mask, kept)
        batch = ReferenceBatch(ids, mask, labels, extras, rows_per_pass=rows)
        with self.accelerator.autocast():  # type: ignore[attr-defined]
            return session.generations.answer(batch, kept), None, None


class AwaitsAnswers:
    """The outermost class: waits when all of the rewards are there, those of the user's own class as well."""

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        session = self._refplug_session  # type: ignore[attr-defined]
        if session is None:
            return super()._generate_and_score_completions(*args, **kwargs)  # type: ignore[misc]
        with session.generations.generation():
            return super()._generate_and_score_completions(*args, **kwargs)  # type: ignore[misc]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        session = self._refplug_session  # type: ignore[attr-defined]
        if session is not None:
            with self.accelerator.autocast():  # type: ignore[attr-defined]
                session.generations.rewards_are_there()
        return rewards
