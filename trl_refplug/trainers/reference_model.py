"""The module that takes the place of TRL's reference model, and passes every batch to the provider."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from trl_refplug.errors import InvalidLogProbsError, RefPlugError, UnsupportedInputError
from trl_refplug.plugins import plugin_manager
from trl_refplug.provider import ReferenceBatch, ReferenceProvider
from trl_refplug.rows.answers import form_problem
from trl_refplug.trainers.prefetch import Prefetcher
from trl_refplug.trainers.read_only import read_only, write_error
from trl_refplug.trainers.requested_batches import ROW_WISE
from trl_refplug.trainers.trl_patch import unsupported_trl


class ReferenceModel(nn.Module):
    """
    The module that is in `trainer.ref_model`. It has no parameters of its own. If the provider has a model in this
    process, it shows the parameters of that one, read-only.

    Args:
        provider ([`ReferenceProvider`]): The provider that answers.
        first_call (`Callable`): Called with the first batch and its log-probs, before they are used. If it raises, it
            is called with the next batch again, until it has returned once.
        prefetcher ([`Prefetcher`], *optional*): It may have asked the provider about the batch already.
        dtype (`torch.dtype`): The dtype of the policy's own log-probs, which the answers are cast to.
        device (`torch.device`, *optional*): The device of the policy's own log-probs, if it is not that of the inputs.

    Attributes:
        calls (`int`): How many times the trainer has asked.
        checked (`bool`): Whether `first_call` has returned. If it is set to `False`, `first_call` is called again.
        seconds (`float`): How long the trainer has waited for answers, in all.
    """

    provider: ReferenceProvider
    _first_call: Callable[[ReferenceBatch, Tensor], None]

    def __init__(
        self,
        provider: ReferenceProvider,
        first_call: Callable[[ReferenceBatch, Tensor], None],
        prefetcher: Prefetcher | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        # The provider is no nn.Module, so that the trainer does not find, move, save or train the model it has.
        self.provider = provider
        self._first_call = first_call
        self._prefetcher = prefetcher
        self._dtype = dtype
        self._device = device
        self.calls = 0
        self.checked = False
        self.seconds = 0.0

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        fused_lm_head: bool = False,
        use_cache: bool | None = None,
        **extras: Any,
    ) -> FusedCausalLMOutput:
        if input_ids is None or labels is None or not fused_lm_head:
            raise unsupported_trl("The trainer called its reference model without `labels=` and `fused_lm_head=True`")
        if "shift_labels" in extras:
            raise unsupported_trl("The trainer called its reference model with `shift_labels=` (context parallelism)")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        batch = ReferenceBatch(input_ids, attention_mask, labels, extras, rows_sliceable=ROW_WISE.issuperset(extras))
        return FusedCausalLMOutput(log_probs=self.ask(batch))

    def ask(self, batch: ReferenceBatch, coming: Sequence[Future[Tensor]] | None = None) -> Tensor:
        """
        The answer to a batch: checked, timed, counted, and told to the observers.

        Args:
            batch ([`ReferenceBatch`]): What the trainer asks.
            coming (`Sequence[Future[Tensor]]`, *optional*): What `submit(batch)` gave.
        """
        if batch.input_ids.is_cuda:
            # Finish the policy's forward pass, which may still run: the time for it is not the reference's.
            torch.cuda.current_stream(batch.input_ids.device).synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            if coming is None and self._prefetcher is not None:
                taken = self._prefetcher.take(batch)
                coming = None if taken is None else [taken]
            log_probs = self.answered(batch, coming)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.calls += 1
        if not self.checked:
            first = batch.in_passes()[0]  # as much as the policy scores at a time
            self._first_call(first, log_probs[: len(first.input_ids)])
            self.checked = True  # not if it failed: whoever trains on after that is to be told again
        plugin_manager().scored(identity=self.provider.identity(), batch=batch, log_probs=log_probs, seconds=seconds)
        return log_probs.to(self._device, self._dtype)

    def look(self, batch: ReferenceBatch) -> Tensor:
        """The answer to a batch that somebody else than the trainer asks about: timed, and not counted."""
        started = time.perf_counter()
        log_probs = self.answered(batch)
        self.seconds += time.perf_counter() - started
        return log_probs

    def submit(self, batch: ReferenceBatch) -> list[Future[Tensor]]:
        """Have the provider start on a batch, for `ask` to wait for. Only with `capabilities.overlap`."""
        coming: list[Future[Tensor]] = []
        try:
            for part in self._parts(batch):
                coming.append(self.provider.submit(part))
        except BaseException:
            for answer in coming:
                answer.cancel()
            raise
        return coming

    def answered(self, batch: ReferenceBatch, coming: Sequence[Future[Tensor]] | None = None) -> Tensor:
        """The provider's own answer to a batch, its form checked."""
        if not batch.rows_sliceable and not self.provider.capabilities.multimodal:
            raise UnsupportedInputError(
                f"Reference provider {self.provider.identity().provider!r} scores text only, and this batch has "
                f"{sorted(set(batch.extras) - ROW_WISE)}. Use ref_provider='frozen' or 'adapter'."
            )
        parts = self._parts(batch)
        if coming is None:
            answers = [self._checked(part, self.provider.log_probs(part)) for part in parts]
        else:
            answers = [self._checked(part, _result(answer)) for part, answer in zip(parts, coming, strict=True)]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def like(self, batch: ReferenceBatch) -> Tensor:
        """An empty tensor of the dtype and on the device of the answer to a batch."""
        return torch.empty(0, dtype=self._dtype, device=self._device or batch.input_ids.device)

    def _parts(self, batch: ReferenceBatch) -> list[ReferenceBatch]:
        """The trainer's own slices, for a model that scores in the trainer's shapes; all rows for any other."""
        exact = self.provider.capabilities.local_model and self.provider.scoring == "exact"
        return batch.in_passes() if exact else [batch]

    def _checked(self, batch: ReferenceBatch, answer: Tensor) -> Tensor:
        if problem := form_problem(answer, batch):  # which the loss would silently turn into nonsense
            raise InvalidLogProbsError(
                f"Reference provider {self.provider.identity().provider!r}: {problem}. Nothing was trained on it."
            )
        return answer.detach()

    def get_parameter(self, target: str) -> nn.Parameter:
        module = self.provider.module
        if module is None:
            raise AttributeError(f"Reference provider {type(self.provider).__name__} has no in-process copy")
        return read_only(module.get_parameter(target))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        module = self.provider.module
        if module is None:
            return iter(())
        return ((name, read_only(parameter)) for name, parameter in module.named_parameters(*args, **kwargs))

    def parameters(self, recurse: bool = True) -> Any:
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise write_error("load_state_dict()")

    def extra_repr(self) -> str:
        return str(self.provider.identity())


def _result(answer: Future[Tensor]) -> Tensor:
    try:
        return answer.result()
    except CancelledError:
        raise RefPlugError(
            "The trainer waited for an answer of its reference that had been cancelled: the provider was closed, or "
            "cancelled it itself. Nothing was trained on it."
        ) from None
