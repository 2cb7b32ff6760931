"""
Prefetching: the reference is asked about the next batches while the policy works on this one.

The trainer takes the batches of an optimizer step from an iterator of ours. Our iterator reads up to `ref_prefetch`
batches more than the trainer has asked for, predicts what the trainer will ask its reference about them, and submits
these requests to the provider. An answer is used only if the trainer's request is equal to the predicted one, bit for
bit; otherwise the provider is asked again.

The run is the same as without prefetching. Accelerate keeps a state of the loader, for example whether the last batch
was read: whenever the trainer gets a batch, this state is set to what it was when that batch was read. And a loader
that draws random numbers from the global streams is not read ahead.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trl_refplug.provider import ReferenceBatch, ReferenceProvider
from trl_refplug.runtime.random_state import random_state
from trl_refplug.runtime.ranks import all_ranks
from trl_refplug.runtime.threads import Autocast
from trl_refplug.trainers.requested_batches import predicted_requests


logger = logging.getLogger("trl_refplug")

_PATIENCE = 3  # after so many wrong predictions in a row, nothing is predicted any more


class Prefetcher:
    """
    Asks the provider of one trainer ahead of time.

    It begins only after the first batches, which show how the trainer asks and whether its loader draws random
    numbers. At most `depth` batches beyond those that the trainer has are in memory, or being answered.

    Args:
        provider ([`ReferenceProvider`]): A provider with `capabilities.overlap`.
        depth (`int`): How many batches to read ahead.
    """

    def __init__(self, provider: ReferenceProvider, depth: int) -> None:
        self._provider = provider
        self._depth = depth
        self._epoch: _Epoch | None = None
        self._reads_ahead: bool | None = None  # not known yet
        self._warned_of_draws = False
        self._autocast: Autocast | None = None  # not known yet
        self._expected: list[_Question] = []
        self._wrong = 0

    @contextmanager
    def around(self, trainer: Any, epoch_iterator: Iterator[Any]) -> Iterator[Iterator[Any]]:
        """
        Surround the code in which the trainer fetches the batches of an optimizer step. The context gives the iterator
        to take them from, in place of `epoch_iterator`. As it ends, the next batches are read and asked about.
        """
        if self._epoch is None or self._epoch.source is not epoch_iterator:
            self.cancel()
            self._epoch = _Epoch(epoch_iterator, trainer.accelerator.gradient_state)
        _cancel(self._expected)
        epoch = self._epoch
        yield epoch
        if self._may_read_ahead(epoch):
            steps_left = trainer.state.max_steps - trainer.state.global_step - 1
            epoch.read_ahead(min(self._depth, steps_left * trainer.args.gradient_accumulation_steps))
        if self._autocast is not None and self._wrong < _PATIENCE:
            for batch in (*epoch.delivered, *epoch.ahead):
                if batch.questions is None:
                    requests = predicted_requests(batch.inputs)
                    batch.questions = [self._submit(request.to(trainer.args.device)) for request in requests]
        self._expected = [question for batch in epoch.delivered for question in batch.questions or ()]
        epoch.delivered.clear()

    def take(self, batch: ReferenceBatch) -> Future[Tensor] | None:
        """
        The answer to `batch`, done or still to come, if it was predicted; `None` if the provider has to be asked now.
        """
        self._autocast = Autocast.current()
        for index, question in enumerate(self._expected):
            if question.autocast == self._autocast and _equal(question.batch, batch):
                self._wrong = 0
                return self._expected.pop(index).answer
        if self._expected:
            self._wrong += 1
            if self._wrong == _PATIENCE:
                logger.warning(
                    "The trainer asks its reference for other batches than its loader gave it (it changes them on the "
                    "way), so the reference cannot be asked ahead of time and every step waits for its answer. Change "
                    "batches in the data collator instead. Or set `ref_prefetch=0`, so that nothing is scored in vain."
                )
        return None

    def cancel(self) -> None:
        """Forget all batches that were read, and all questions that were asked, ahead. Answers are not waited for."""
        _cancel(self._expected)
        if self._epoch is not None:
            for batch in self._epoch.ahead:
                _cancel(batch.questions or [])
            self._epoch = None

    def _submit(self, request: ReferenceBatch) -> _Question:
        batch = request.copy()  # a copy, because the trainer may change its own batch in place
        assert self._autocast is not None
        answer: Future[Tensor]
        try:
            with torch.no_grad(), self._autocast.entered():
                answer = self._provider.submit(batch)
        except Exception as error:  # to be raised in the step that needs the answer
            answer = Future()
            answer.set_exception(error)
        return _Question(batch, self._autocast, answer)

    def _may_read_ahead(self, epoch: _Epoch) -> bool:
        """
        Whether batches may be read ahead. All ranks decide this together, and once, because reading a loader can be a
        collective operation.
        """
        if self._reads_ahead is None and epoch.read > 1:
            self._reads_ahead = all_ranks(not epoch.draws)
        if epoch.draws and not self._warned_of_draws:
            self._warned_of_draws = True
            logger.warning(
                "The training data is made with random numbers of the global streams (by the dataset, its transform "
                "or the data collator). Reading it ahead changes which numbers it gets, and so the run. %s Give it a "
                "generator of its own, or make it in worker processes (`dataloader_num_workers=1`).",
                "Use `ref_prefetch=0` to keep the run as it is." if self._reads_ahead else "So it is not read ahead.",
            )
        return bool(self._reads_ahead)


@dataclass
class _Question:
    """A batch that the provider was asked about ahead of time, and the autocast state it was asked in."""

    batch: ReferenceBatch
    autocast: Autocast
    answer: Future[Tensor]


@dataclass
class _Batch:
    """
    A batch that was read from the loader, or the error that reading raised. `loader_state` is what accelerate said
    about the loader at that time, `questions` what the provider was asked about the batch.
    """

    inputs: Any
    error: Exception | None
    loader: Any
    loader_state: tuple[bool, int]
    questions: list[_Question] | None = None

    def restore_loader_state(self) -> None:
        if self.loader is not None:
            self.loader.end_of_dataloader, self.loader.remainder = self.loader_state


@dataclass
class _Epoch:
    """
    One pass over the trainer's loader.

    Args:
        source (`Iterator`): The trainer's own iterator over its loader.
        gradient_state: Accelerate's `GradientState`, which knows that loader.

    Attributes:
        ahead (`deque[_Batch]`): Batches that were read, and that the trainer does not have yet.
        delivered (`list[_Batch]`): Batches of this step that the trainer has been given.
        read (`int`): How many batches were read.
        draws (`bool`): Whether reading a batch drew random numbers. The first batch does not count, because a loader
            may draw some as it starts.
    """

    source: Iterator[Any]
    gradient_state: Any
    ahead: deque[_Batch] = field(default_factory=deque)
    delivered: list[_Batch] = field(default_factory=list)
    read: int = 0
    draws: bool = False
    _last: _Batch | None = None

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> Any:
        self._last = batch = self.ahead.popleft() if self.ahead else self._read()
        batch.restore_loader_state()
        if batch.error is not None:
            raise batch.error
        self.delivered.append(batch)
        return batch.inputs

    def read_ahead(self, count: int) -> None:
        """Read until `count` batches are ready, or there are no more."""
        while len(self.ahead) < count and self._more():
            try:
                self.ahead.append(self._read())
            except StopIteration:
                break
        if self._last is not None:
            self._last.restore_loader_state()

    def _more(self) -> bool:
        # Asking an exhausted loader for a batch would end its epoch, and the trainer may never ask for that one.
        newest = self.ahead[-1] if self.ahead else self._last
        return newest is None or (newest.error is None and newest.loader is not None and not newest.loader_state[0])

    def _read(self) -> _Batch:
        before = random_state()
        inputs = error = None
        try:
            inputs = next(self.source)
        except StopIteration:
            raise
        except Exception as raised:  # raised when the trainer asks for this batch
            error = raised
        self.draws = self.draws or (self.read > 0 and before != random_state())
        self.read += 1
        loader = self.gradient_state.active_dataloader
        state = (False, -1) if loader is None else (loader.end_of_dataloader, loader.remainder)
        return _Batch(inputs, error, loader, state)


def _cancel(questions: list[_Question]) -> None:
    for question in questions:
        question.answer.cancel()
    questions.clear()


def _equal(one: ReferenceBatch, other: ReferenceBatch) -> bool:
    return one.rows_sliceable == other.rows_sliceable and _same(_tensors(one), _tensors(other))


def _tensors(batch: ReferenceBatch) -> dict[str, Any]:
    return {"ids": batch.input_ids, "mask": batch.attention_mask, "labels": batch.labels, **batch.extras}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        value.device == other[name].device and value.dtype == other[name].dtype and torch.equal(value, other[name])
        if isinstance(value, Tensor) and isinstance(other[name], Tensor)
        else type(value) is type(other[name]) and bool(value == other[name])
        for name, value in one.items()
    )
